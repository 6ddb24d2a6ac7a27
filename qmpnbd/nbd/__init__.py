"""An NBD client: the protocol as values and generators, and the doors that drive them over sockets."""
