"""Completion scripts for bash, zsh and fish, from what the parsers know; pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from qmpnbd.cli.described import Argument, Command


def bash(commands: Sequence[Command]) -> str:
    """Returns the script for bash."""
    lines = [
        "# bash completion for qmpnbd; made by `qmpnbd completion bash`",
        "_qmpnbd() {",
        "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command= each",
        '    for each in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        "        [[ $each == -* ]] || { command=$each; break; }",
        "    done",
        "    COMPREPLY=()",
        "    case $command in",
    ]
    for command in commands:
        lines += [f"    {command.name})", *_bash_values(command)]
        names = " ".join(name for option in command.options for name in option.names)
        words, files = _positional(command)
        lines.append(f"        [[ $word == -* ]] && {{ {_bash_words(names)}; return; }}")
        if words and files:  # a subcommand, and what it is for
            lines.append(f"        [[ $before == {command.name} ]] && {{ {_bash_words(' '.join(words))}; return; }}")
            words = ()
        lines += [f"        {_bash_reply(words, files)}", "        ;;"]
    names = " ".join([command.name for command in commands] + ["--help", "--version"])
    return "\n".join([*lines, f"    *) {_bash_words(names)} ;;", "    esac", "}", "complete -F _qmpnbd qmpnbd", ""])


def _bash_values(command: Command) -> Iterator[str]:
    yield "        case $before in"
    for option in command.options:
        if option.value:
            yield f"        {'|'.join(option.names)}) {_bash_reply(option.choices, option.files)}; return ;;"
    yield "        esac"


def _bash_reply(words: Sequence[str], files: str) -> str:
    if words:
        return _bash_words(" ".join(words))
    flag = {"file": "-f", "folder": "-d"}.get(files)
    if flag is None:
        return ":"
    return f'compopt -o filenames; mapfile -t COMPREPLY < <(compgen {flag} -- "$word")'


def _bash_words(words: str) -> str:
    return f"mapfile -t COMPREPLY < <(compgen -W '{words}' -- \"$word\")"


_ZSH_END = """\
if [[ $funcstack[1] == _qmpnbd ]]; then
    _qmpnbd "$@"
else
    compdef _qmpnbd qmpnbd
fi"""
"""Found in fpath the file is the function itself; else it is sourced."""


def zsh(commands: Sequence[Command]) -> str:
    """Returns the script for zsh."""
    lines = [
        "#compdef qmpnbd",
        "# zsh completion for qmpnbd; made by `qmpnbd completion zsh`",
        "_qmpnbd() {",
        "    local context state state_descr line",
        "    typeset -A opt_args",
        "    _arguments -C '(- *)'{-h,--help}'[show help]' '(- *)--version[show the version]' \\",
        "        '1: :->command' '*:: :->arguments'",
        "    case $state in",
        "    command)",
        "        local -a commands=(",
        *(f"            '{command.name}:{_zsh_text(command.words)}'" for command in commands),
        "        )",
        "        _describe command commands",
        "        ;;",
        "    arguments)",
        "        case $line[1] in",
    ]
    for command in commands:
        words, files = _positional(command)
        specs = [spec for option in command.options for spec in _zsh_option(option)]
        if words and files:  # a subcommand, and what it is for
            specs.append(f"'1: :{_zsh_values(words, files)}'")
            words = ()
        specs.append(f"'*: :{_zsh_values(words, files)}'")
        lines += [f"        {command.name})", "            _arguments -s \\"]
        lines += [f"                {spec} \\" for spec in specs[:-1]]
        lines += [f"                {specs[-1]}", "            ;;"]
    return "\n".join([*lines, "        esac", "        ;;", "    esac", "}", _ZSH_END, ""])


def _zsh_option(option: Argument) -> Iterator[str]:
    value = f":{_zsh_text(option.value)}:{_zsh_values(option.choices, option.files)}" if option.value else ""
    for name in option.names:
        equals = "=" if name.startswith("--") and option.value else ""
        yield f"'{name}{equals}[{_zsh_text(option.words)}]{value}'"


def _zsh_values(words: Sequence[str], files: str) -> str:
    if words:
        return f"({' '.join(words)})"
    return {"file": "_files", "folder": "_files -/"}.get(files, " ")


def _zsh_text(text: str) -> str:
    """Returns text for a single-quoted specification, in which colons and brackets have a meaning."""
    for mark in "\\[]:":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("'", "'\\''")


def fish(commands: Sequence[Command]) -> str:
    """Returns the script for fish."""
    lines = [
        "# fish completion for qmpnbd; made by `qmpnbd completion fish`",
        "complete -c qmpnbd -f",
        "complete -c qmpnbd -n __fish_use_subcommand -l version -d 'show the version'",
    ]
    for command in commands:
        lines.append(f"complete -c qmpnbd -n __fish_use_subcommand -a {command.name} -d {_fish_text(command.words)}")
        seen = f"complete -c qmpnbd -n '__fish_seen_subcommand_from {command.name}'"
        lines += [f"{seen} {_fish_option(option)}" for option in command.options]
        words, files = _positional(command)
        if words:
            lines.append(f"{seen} {_fish_values(words, '')}")
        if files:
            lines.append(f"{seen} {_fish_values((), files)}")
    return "\n".join([*lines, ""])


def _fish_option(option: Argument) -> str:
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
    values = [f"-x {_fish_values(option.choices, option.files)}".rstrip()] if option.value else []
    return " ".join([*names, *values, f"-d {_fish_text(option.words)}"])


def _fish_values(words: Sequence[str], files: str) -> str:
    if words:
        return f"-a '{' '.join(words)}'"
    return {"file": "-F", "folder": "-a '(__fish_complete_directories)'"}.get(files, "")


def _fish_text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _positional(command: Command) -> tuple[tuple[str, ...], str]:
    """Returns the choices of a command's first positional argument, and what files any of them names."""
    others = [each for each in command.arguments if not each.names]
    named = {each.files for each in others}
    # Where files are offered, folders are, too.
    files = next((kind for kind in ("file", "folder") if kind in named), "")
    return others[0].choices if others else (), files


SHELLS: dict[str, Callable[[Sequence[Command]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
"""Shell -> what makes its script."""
