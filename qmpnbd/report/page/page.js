"use strict";
// Draws each disk's map again, in as much detail as there is, and lets it be zoomed. Without this the page shows the
// whole disk at once. Nothing here comes from outside but numbers and names, and names are only ever set as text.
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
const EXACT = Number.MAX_SAFE_INTEGER;

function human(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < UNITS.length - 1) { bytes /= 1024; unit += 1; }
  return Number(bytes.toPrecision(4)) + " " + UNITS[unit];
}

// Index of the run that holds an offset; ends ascend.
function runAt(ends, offset) {
  let low = 0, high = ends.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle] > offset) { high = middle; } else { low = middle + 1; }
  }
  return low;
}

class Strip {
  constructor(box, disk) {
    this.disk = disk;
    this.whole = disk.ends[disk.ends.length - 1];
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", box.querySelector("svg").getAttribute("aria-label"));
    this.frame = box.querySelector(".window");
    this.overview = box.querySelector(".whole");
    this.words = box.querySelector(".words");
    this.hint = this.words.textContent;
    box.querySelector(".zoomed").append(this.canvas);
    for (const button of box.querySelectorAll("button[data-zoom]")) {
      button.addEventListener("click", () => this.zoom(Number(button.dataset.zoom)));
    }
    this.listen();
    this.show(0, this.whole);
  }

  listen() {
    const canvas = this.canvas;
    canvas.addEventListener("pointerdown", (event) => { this.from = this.offsetOf(event); canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerup", (event) => this.release(event));
    canvas.addEventListener("pointercancel", () => { this.from = undefined; this.draw(); });
    canvas.addEventListener("pointerleave", () => { this.words.textContent = this.hint; });
    canvas.addEventListener("dblclick", () => this.show(0, this.whole));
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) { return; }
      event.preventDefault();
      this.zoom(event.deltaY < 0 ? 1.25 : 0.8, this.offsetOf(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  key(event) {
    const step = (this.end - this.start) / 8;
    const keys = {
      ArrowLeft: () => this.show(this.start - step, this.end - step),
      ArrowRight: () => this.show(this.start + step, this.end + step),
      "+": () => this.zoom(2), "-": () => this.zoom(0.5), Home: () => this.zoom(0),
    };
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  }

  // Shows [start, end), moved and widened as far as the disk makes it necessary.
  show(start, end) {
    const length = Math.min(Math.max(end - start, Math.min(512, this.whole)), this.whole);
    this.start = Math.min(Math.max(start, 0), this.whole - length);
    this.end = this.start + length;
    this.overview.style.display = length < this.whole ? "block" : "none";
    this.frame.style.left = (100 * this.start / this.whole) + "%";
    this.frame.style.width = "max(8px, " + (100 * length / this.whole) + "%)";
    this.draw();
  }

  // By a factor, around an offset; a factor of 0 shows the whole disk.
  zoom(factor, around = (this.start + this.end) / 2) {
    if (factor === 0) { this.show(0, this.whole); return; }
    this.show(around - (around - this.start) / factor, around + (this.end - around) / factor);
  }

  offsetOf(event) {
    const place = this.canvas.getBoundingClientRect();
    const share = Math.min(Math.max((event.clientX - place.left) / place.width, 0), 1);
    return Math.min(this.start + share * (this.end - this.start), this.whole - 1);
  }

  point(event) {
    const offset = Math.floor(this.offsetOf(event));
    const { ends, depths, names, exact } = this.disk;
    const run = runAt(ends, offset);
    const first = run ? ends[run - 1] : 0;
    const name = names[depths[run]] || "depth " + depths[run];
    const bytes = this.whole <= EXACT && exact ? "  [" + first + ", " + ends[run] + ")" : "";
    const mark = this.disk.bad.some(([from, to]) => from <= offset && offset < to) ? "discrepancy, served: " : "";
    this.words.textContent = human(offset) + "  " + mark + name + ", " + (exact ? "" : "about ") + human(ends[run] - first) + bytes;
    if (this.from !== undefined) { this.draw(this.from, offset); }
  }

  release(event) {
    const from = this.from, to = this.offsetOf(event);
    this.from = undefined;
    const pixels = Math.abs(to - from) / (this.end - this.start) * this.canvas.clientWidth;
    if (pixels > 4) { this.show(Math.min(from, to), Math.max(from, to)); } else { this.draw(); }
  }

  draw(from, to) {
    const canvas = this.canvas, scale = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) { return; }
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    pen.scale(scale, scale);
    const colour = (name) => style.getPropertyValue("--" + name).trim();
    const x = (offset) => (offset - this.start) / (this.end - this.start) * width;
    const top = 10, bottom = height - 24;
    const { ends, depths } = this.disk;
    for (let run = runAt(ends, this.start); run < ends.length; run += 1) {
      const first = run ? ends[run - 1] : 0;
      if (first >= this.end) { break; }
      const left = Math.max(x(first), 0);
      pen.fillStyle = colour(this.disk.classes[depths[run]] || "dx");
      pen.fillRect(left, top, Math.min(x(ends[run]), width) - left + 0.35, bottom - top);
    }
    this.marks(pen, this.disk.open, colour("open"), bottom + 2, 4, x);
    this.marks(pen, this.disk.bad, colour("bad"), 0, 7, x);
    this.axis(pen, colour("soft"), bottom, width, x);
    if (from !== undefined) {
      pen.globalAlpha = 0.25;
      pen.fillStyle = colour("ink");
      pen.fillRect(x(Math.min(from, to)), top, Math.abs(x(to) - x(from)), bottom - top);
    }
  }

  marks(pen, ranges, colour, y, height, x) {
    pen.fillStyle = colour;
    for (const [from, to] of ranges) {
      if (to > this.start && from < this.end) { pen.fillRect(x(from) - 2, y, Math.max(x(to) - x(from), 1) + 4, height); }
    }
  }

  axis(pen, colour, bottom, width, x) {
    const rough = (this.end - this.start) / Math.max(2, width / 130);
    const step = 2 ** Math.ceil(Math.log2(Math.max(rough, 1)));
    pen.fillStyle = colour;
    pen.font = "11px system-ui, sans-serif";
    for (let at = Math.ceil(this.start / step) * step; at < this.end; at += step) {
      const place = x(at), words = human(at);
      pen.fillRect(Math.min(place, width - 1), bottom + 6, 1, 4);
      if (place + pen.measureText(words).width < width) { pen.fillText(words, place, bottom + 21); }
    }
  }
}

document.documentElement.classList.add("js");
const strips = new Map();
for (const disk of JSON.parse(document.getElementById("disks").textContent)) {
  strips.set(String(disk.number), new Strip(document.getElementById("picture-" + disk.number), disk));
}
for (const button of document.querySelectorAll("button.go")) {
  const strip = strips.get(button.dataset.disk);
  button.disabled = !strip;
  button.addEventListener("click", () => {
    const from = Number(button.dataset.from), to = Number(button.dataset.to), room = Math.max(4 * (to - from), strip.whole / 500);
    strip.show(from - room, to + room);
    strip.canvas.scrollIntoView({ block: "center" });
    strip.canvas.focus({ preventScroll: true });
  });
}
