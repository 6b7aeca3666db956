"""Opens HTML pages in headless Chromium and lists what a reader would see go wrong.

Views: a laptop (light, then dark), a phone, A4 paper. Problems: console errors; requests for
anything but the page; images that do not show; text that is cut off, off the page or its svg,
overlapping, too small or too faint; a `.hit` or `[data-tip]` without a `.tip` under the mouse; a
page that does not print. Each is named in the first view that has it; faults of text, eight of a
kind at most. Not looked at: text in a canvas or an image, or by ::before and ::after; backgrounds
with images or gradients. No host name resolves. Status: 0 none, 1 problems, 2 it could not run.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 20.0  # seconds for one answer of the browser
HITS = 20  # elements hovered over in one view; two views hover
VIEWS = {  # width, height, colour scheme, what is looked at
    "laptop": (1366, 768, "light", ["fit", "small", "contrast", "hover"]),
    "laptop, dark": (1366, 768, "dark", ["contrast", "hover"]),
    "phone": (390, 844, "light", ["fit", "phone"]),
    "print": (718, 1047, "light", ["fit", "contrast", "print"]),  # A4 less margins of 1 cm
}
# Containers lack a GPU and /dev/shm, and root a sandbox. The rule keeps a page from reaching out.
OFF = ["gpu", "dev-shm-usage", "extensions", "sync", "background-networking", "component-update"]
FLAGS = ["--headless", "--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND"]
FLAGS += [f"--disable-{word}" for word in OFF] + ["--no-sandbox"] * (os.geteuid() == 0)

# What a reader would wait for or open: folded parts, lazy images, fonts, the end of animations.
SETTLE = r"""async unfold => {
  if (document.readyState !== "complete") await new Promise(done => addEventListener("load", done));
  if (unfold) document.querySelectorAll("details").forEach(e => { e.open = true; });
  document.querySelectorAll("[loading=lazy]").forEach(e => { e.loading = "eager"; });
  const images = [...document.images].map(e => e.decode().catch(() => 0));
  await Promise.all([document.fonts.ready, new Promise(done => setTimeout(done, 300)), ...images]);
  for (const a of document.getAnimations()) try { a.finish(); } catch { /* an endless one */ }
  scrollTo(0, 0);
}"""

# -> [[kind, what], ...], for the whole page or the text in what matches `only`. A piece of text is
# a text node, or a <g id="...text_N"> of outlined glyphs, as matplotlib writes them.
PROBE = r"""(checks, only) => {
const found = [], say = (kind, what) =>  // at most eight of a kind
  found.filter(pair => pair[0] === kind).length < 8 && found.push([kind, what]);
const on = name => checks.includes(name), paper = on("print"), px = Math.round;
const keep = (make, memo = new Map()) => key => memo.get(key) ?? memo.set(key, make(key)).get(key);
const root = document.documentElement, wide = root.clientWidth, css = keep(getComputedStyle);
const shown = e => e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true});
const pieces = [], range = document.createRange();
const box = (r, em) => {  // glyphs keep to about the em box, which is less than a line's rectangle
  const b = r.toJSON(), [from, to] = r.height < 1.6 * em ? ["top", "bottom"] : ["left", "right"];
  const spare = b[to] - b[from] - em;
  if (spare > 0 && spare < 0.6 * em) { b[from] += spare / 2; b[to] -= spare / 2; }
  return b;
};
const add = (el, words, rects, em, glyphs) => {
  const boxes = [...rects].filter(r => r.width > 0.5 && r.height > 0.5).map(r => box(r, em));
  const svg = el instanceof SVGElement ? el.ownerSVGElement : null;
  const name = JSON.stringify(words.length > 40 ? words.slice(0, 40) + "\u2026" : words);
  if (boxes.length) pieces.push({el, svg, boxes, em, glyphs, name});
};
for (const top of only ? document.querySelectorAll(only) : [document.body]) {
  const walker = document.createTreeWalker(top, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const el = node.parentElement, words = node.data.trim().replace(/\s+/g, " ");
    if (!words || !shown(el)) continue;
    range.selectNodeContents(node);
    const m = el.getScreenCTM?.(), zoom = m ? Math.sqrt(Math.abs(m.a * m.d - m.b * m.c)) : 1;
    add(el, words, range.getClientRects(), parseFloat(css(el).fontSize) * zoom, null);
  }
  for (const g of top.querySelectorAll('svg g[id*="text_"]')) {
    const glyphs = g.querySelector("use, path"), note = [...g.childNodes].find(n => n.data?.trim());
    if (/(^|[^a-z])text_\d+$/i.test(g.id) && glyphs && !g.querySelector("text") && shown(g))
      add(g, note?.data.trim() ?? "#" + g.id, [g.getBoundingClientRect()], 0, glyphs);
  }
}
// The boxes that cut what an element holds; one out of the flow escapes those it is not placed in.
const cutters = keep(start => {
  const list = [];
  for (let a = start, escaped = false; a && a !== root; a = a.parentElement) {
    const s = css(a), r = a.getBoundingClientRect(), w = a.clientWidth, h = a.clientHeight;
    const left = r.left + a.clientLeft, top = r.top + a.clientTop;
    if (s.position !== "static" || s.transform !== "none") escaped = false;
    if (s.overflow !== "visible" && s.display !== "inline" && !escaped && a !== document.body)
      list.push({a, s, w, h, left, top, right: left + w, bottom: top + h});
    if (s.position === "fixed") break;
    if (s.position === "absolute") escaped = true;
  }
  return list;
});
const judge = piece => {  // the parts of its boxes that can be seen, and one complaint at most
  let wrong = null, start = piece.el, parts = [];
  while (start instanceof SVGElement) start = start.parentElement;
  const list = cutters(start);
  if (list.some(c => c.w * c.h === 0 || (c.w <= 1 && c.h <= 1))) return [[], null];  // on purpose
  for (const b of piece.boxes) {
    const part = {...b, piece}, r = piece.svg?.getBoundingClientRect() ?? b;
    const by = Math.max(r.left - b.left, b.right - r.right, r.top - b.top, b.bottom - r.bottom);
    if (by > 1) wrong ??= `${px(by)} px outside its svg`;
    for (const c of list)
      for (const [from, to, flow, slack, rolled] of
           [["left", "right", c.s.overflowX, 1, c.a.scrollLeft],
            ["top", "bottom", c.s.overflowY, 2, c.a.scrollTop]]) {
        if (flow === "visible") continue;
        const before = c[from] - part[from] > slack, after = part[to] - c[to] > slack;
        const rolls = !paper && /auto|scroll/.test(flow);  // then what comes after can be reached
        if ((before && !rolled) || (after && !rolls)) wrong ??= "cut off";
        part[from] = Math.max(part[from], c[from]);
        part[to] = Math.min(part[to], c[to]);
      }
    if (part.right <= part.left || part.bottom <= part.top) continue;
    parts.push(part);
    const off = Math.max(-part.left, part.right - wide, -part.top - scrollY);
    if (off > 1) wrong ??= `${px(off)} px off the page`;
  }
  return [parts, wrong];
};
const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
const colour = keep(text => {  // any CSS colour -> [r, g, b to 255, alpha to 1]
  pen.clearRect(0, 0, 1, 1); pen.fillStyle = text; pen.fillRect(0, 0, 1, 1);
  return [...pen.getImageData(0, 0, 1, 1).data].map((v, i) => i < 3 ? v : v / 255);
});
const over = (a, b, alpha = a[3]) => [0, 1, 2].map(i => alpha * a[i] + (1 - alpha) * b[i]);
const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) =>
  sum + w * (c[i] <= 10.3 ? c[i] / 3294.6 : ((c[i] / 255 + 0.055) / 1.055) ** 2.4), 0.05);
const dark = !paper && matchMedia("(prefers-color-scheme: dark)").matches;
const sheet = dark && css(root).colorScheme.includes("dark") ? [18, 18, 18] : [255, 255, 255];
const ground = keep(e => e ? over(colour(css(e).backgroundColor), ground(e.parentElement)) : sheet);
const svgGround = piece => {  // the shapes drawn before a text in an svg, under its middle
  const s = css(piece.glyphs ?? piece.el), b = piece.boxes[0], svg = piece.el.closest("svg");
  if (s.stroke !== "none" && s.paintOrder.startsWith("stroke")) return colour(s.stroke);
  const p = new DOMPoint((b.left + b.right) / 2, (b.top + b.bottom) / 2);
  return [...svg.querySelectorAll(":is(rect, path, circle, polygon):not(defs *)")].filter(e =>
    e.compareDocumentPosition(piece.el) === Node.DOCUMENT_POSITION_FOLLOWING && shown(e) &&
    !/none|url/.test(css(e).fill) && e.isPointInFill(p.matrixTransform(e.getScreenCTM().inverse()))
  ).map(e => [colour(css(e).fill), css(e).fillOpacity * css(e).opacity])
    .reduce((under, [c, alpha]) => over(c, under, alpha * c[3]), ground(svg));
};
const contrast = piece => {
  const s = css(piece.glyphs ?? piece.el), c = colour(piece.svg ? s.fill : s.color);
  const under = piece.svg ? svgGround(piece) : ground(piece.el);
  let alpha = c[3] * (piece.svg ? s.fillOpacity : 1);
  for (let a = piece.el; a; a = a.parentElement) alpha *= css(a).opacity;
  return Math.exp(Math.abs(Math.log(light(over(c, under, alpha)) / light(under))));
};
const seen = [];
for (const piece of pieces) {
  const [parts, wrong] = judge(piece), b = piece.boxes[0], m = piece.glyphs?.getScreenCTM();
  if (on("fit") && wrong) say("does not fit", `${piece.name} is ${wrong}`);
  if (!parts.length) continue;
  seen.push(...parts);
  const turned = m && Math.abs(m.b) > Math.abs(m.a), least = m ? 6 : 9;
  const high = piece.em || (turned ? b.right - b.left : b.bottom - b.top);
  if (on("small") && high < least - 0.01)
    say("too small", `${piece.name}, ${high.toFixed(1)} px instead of ${least}`);
  const ratio = on("contrast") ? contrast(piece) : 21;
  if (ratio < 4.495) say("too faint", `${piece.name}, contrast ${ratio.toFixed(2)} instead of 4.5`);
}
if (on("fit")) seen.sort((a, b) => a.top - b.top).forEach((a, i) => {
  for (let j = i + 1; j < seen.length && seen[j].top < a.bottom - 2; j++) {
    const b = seen[j], deep = Math.min(a.bottom, b.bottom) - b.top;
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    if (a.piece !== b.piece && across > 2 && deep > 2)
      say("overlap", `${a.piece.name} and ${b.piece.name} by ${px(across)} x ${px(deep)} px`);
  }
});
if (only) return found;
if (on("phone") && wide !== 390) say("does not fit", `laid out for ${wide} px instead of 390`);
if (on("fit") && root.scrollWidth > wide + 1)
  say("does not fit", `the page is ${root.scrollWidth} px wide, its window ${wide} px`);
for (const i of document.images)
  if (!i.naturalWidth) say("image", `does not show: ${i.alt || i.src.slice(0, 60)}`);
for (const l of document.querySelectorAll('link[href]:not([href^="data:"], [rel=canonical])'))
  say("request", `<link rel="${l.rel}"> to ${l.href}`);  // a preconnect leaves no event
return found;
}"""

# Where to point at the n-th element that promises a tip; nothing after the last.
TARGET = r"""(n, most) => {
  const all = [...document.querySelectorAll(".hit, [data-tip]")].filter(e =>
    e.checkVisibility({checkVisibilityCSS: true}) && e.getClientRects().length);
  const e = all[Math.floor(n * Math.max(1, all.length / most))];
  e?.scrollIntoView({block: "center", inline: "center", behavior: "instant"});
  const r = e?.getBoundingClientRect(), name = e?.dataset.tip || e?.id || e?.outerHTML.slice(0, 60);
  for (const i of e ? [5, 3, 7, 1, 9] : []) for (const j of [5, 3, 7, 1, 9]) {
    const x = r.left + r.width * i / 10, y = r.top + r.height * j / 10;
    if (document.elementFromPoint(x, y)?.closest(".hit, [data-tip]") === e) return {x, y, name};
  }
  return e ? {name} : {};
}"""

# Waits for a tip inside the window, or for none at all; -> what went wrong, or null.
TIP = r"""wanted => new Promise(done => {
  const end = performance.now() + 1000, look = () => {
    const tips = [...document.querySelectorAll(".tip")].filter(e => e.textContent.trim() &&
      e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true}) && e.offsetHeight !== 0);
    const lost = tips.map(e => e.getBoundingClientRect()).every(r =>
      r.left < -1 || r.top < -1 || r.right > innerWidth + 1 || r.bottom > innerHeight + 1);
    const wrong = !tips.length ? wanted && "shows no tip" : !wanted ? "its tip stays" :
      lost && "its tip leaves the window";
    if (wrong && performance.now() < end) requestAnimationFrame(look); else done(wrong || null);
  };
  look();
})"""


@dataclass
class Browser:
    """A Chromium, and the DevTools messages to it and from it."""

    process: Any
    session: dict[str, Any] = field(default_factory=dict)
    count: int = 0
    unread: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command; events that come before it are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **self.session}
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        reader, deadline = self.process.stdout.fileno(), time.monotonic() + PATIENCE
        while message.get("id") != self.count or "method" in message:
            while b"\0" not in self.unread:
                left = deadline - time.monotonic()
                if left < 0 or not select.select([reader], [], [], left)[0]:
                    raise TimeoutError(f"no answer to {method} for {PATIENCE:.0f} s")
                if not (data := os.read(reader, 1 << 20)):
                    raise ConnectionError("chromium ended")
                self.unread += data
            line, _, self.unread = self.unread.partition(b"\0")
            message = json.loads(line)
            self.events += [message] if "method" in message else []
        if wrong := message.get("error") or message["result"].get("errorText"):
            raise RuntimeError(f"{method}: {wrong}")
        return message["result"]

    def call(self, function: str, *arguments: Any) -> Any:
        """What a JavaScript function returns in the page, awaited."""
        code = {"expression": f"({function})({', '.join(map(json.dumps, arguments))})"}
        answer = self.ask("Runtime.evaluate", **code, awaitPromise=True, returnByValue=True)
        if thrown := answer.get("exceptionDetails"):
            raise RuntimeError(thrown.get("exception", {}).get("description", thrown["text"]))
        return answer["result"].get("value")


@contextlib.contextmanager
def chromium(binary: str) -> Iterator[Browser]:
    """A running Chromium with a directory of its own; both are gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        log, pipe = Path(home, "stderr"), subprocess.PIPE
        # It reads commands from its descriptor 3 and writes to 4.
        shell = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>"$0"', str(log)]
        command = [*shell, binary, *FLAGS, f"--user-data-dir={home}"]
        env = {**os.environ, "TMPDIR": home, "XDG_CONFIG_HOME": home}
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, process_group=0)
        try:
            browser = Browser(process)
            browser.ask("Browser.getVersion")
            yield browser
        except OSError as error:
            raise OSError(f"{binary}: {error}; {log.read_text()[-300:].strip()}") from error
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def troubles(events: list[dict[str, Any]], address: str) -> Iterator[tuple[str, str]]:
    """The kind and the words of every problem that the browser itself reported."""
    for event in events:
        p = event["params"]
        match event["method"]:
            case "Runtime.exceptionThrown":
                thrown = p["exceptionDetails"]
                yield "exception", thrown.get("exception", {}).get("description", thrown["text"])
            case "Runtime.consoleAPICalled" if p["type"] in ("error", "assert"):
                words = [str(a.get("value", a.get("description"))) for a in p["args"]]
                yield "console", " ".join(words)
            case "Log.entryAdded" if p["entry"]["level"] == "error":
                yield "console", f"{p['entry']['text']} {p['entry'].get('url', '')}"
            case "Network.requestWillBeSent":
                url = p["request"]["url"].partition("#")[0]
                if not url.startswith("data:") and url != address:
                    yield "request", url
            case "Network.webSocketCreated":
                yield "request", p["url"]
            case "Target.attachedToTarget":
                yield "request", f"not to be seen in the {p['targetInfo']['type']} it starts"


def hover(browser: Browser) -> Iterator[tuple[str, str]]:
    """Points at elements that promise a tip, and looks at the tips."""
    for n in range(HITS):
        spot, wrong = browser.call(TARGET, n, HITS), "cannot be pointed at"
        if "x" in spot:
            browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=spot["x"], y=spot["y"])
            wrong = browser.call(TIP, True)
            yield from browser.call(PROBE, ["fit", "small", "contrast"], ".tip")
            browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
            wrong = wrong or browser.call(TIP, False)
        if spot and wrong:
            yield "hover", f"{spot['name']}: {wrong}"


def look(browser: Browser, page: Path, view: str, shots: Path | None) -> Iterator[tuple[str, str]]:
    """Opens a page in a view; the kind and the words of every problem to see there."""
    width, height, scheme, checks = VIEWS[view]
    paper, mobile = "print" in checks, "phone" in checks
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.ask("Emulation.setDeviceMetricsOverride", **size)
    browser.ask("Emulation.setScrollbarsHidden", hidden=paper)
    dark = {"name": "prefers-color-scheme", "value": scheme}
    browser.ask("Emulation.setEmulatedMedia", media="print" if paper else "", features=[dark])
    browser.ask("Page.navigate", url=page.as_uri())
    browser.call(SETTLE, not paper)
    yield from browser.call(PROBE, checks, None)
    if "hover" in checks:
        yield from hover(browser)
    if shots:  # after the mouse, because it resizes the window for a moment
        browser.call("() => scrollTo(0, 0)")
        area = browser.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {**area, "width": max(area["width"], width), "scale": 1}
        shot = browser.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        name = f"{page.parent.name}-{page.stem}-{view.replace(', ', '-')}.png"
        (shots / name).write_bytes(base64.b64decode(shot))
    if paper:
        a4 = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}
        pdf = base64.b64decode(browser.ask("Page.printToPDF", preferCSSPageSize=True, **a4)["data"])
        if pdf.count(b"/Type /Page") <= pdf.count(b"/Type /Pages"):
            yield "print", "gives no page"


def problems(browser: Browser, page: Path, shots: Path | None) -> Iterator[str]:
    """What is wrong with a page, a line each, in the first view that has it."""
    target = browser.ask("Target.createTarget", url="about:blank")
    browser.session = browser.ask("Target.attachToTarget", **target, flatten=True)
    for domain in ("Page", "Runtime", "Log", "Network"):
        browser.ask(f"{domain}.enable")
    browser.ask("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
    told: set[str] = set()
    for view in VIEWS:
        browser.events.clear()
        found: list[tuple[str, str]] = []
        try:
            found.extend(look(browser, page, view, shots))
        except (TimeoutError, RuntimeError) as error:
            found.append(("stuck", str(error)))
        found.extend(troubles(browser.events, page.as_uri()))
        lines = dict.fromkeys(" ".join(f"{kind}: {what}".split())[:300] for kind, what in found)
        yield from (f"{page}, {view}: {line}" for line in lines if line not in told)
        told.update(lines)
    browser.session = {}
    browser.ask("Target.closeTarget", **target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE.html")
    names = ["chromium", "chromium-browser", "google-chrome"]
    parser.add_argument("--chromium", nargs=1, default=names, metavar="PATH", help="the browser")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="keep a picture per view")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # so that the browser is ended too
    bad = 0
    try:
        pages = [page.resolve(strict=True) for page in options.pages]
        if not (binary := next(filter(None, map(shutil.which, options.chromium)), None)):
            raise OSError(f"no {' or '.join(options.chromium)} here; install chromium")
        if options.screenshots:
            options.screenshots.mkdir(parents=True, exist_ok=True)
        with chromium(binary) as browser:
            for page in pages:
                for line in problems(browser, page, options.screenshots):
                    print(line, flush=True)
                    bad += 1
    except OSError as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    print(f"{len(pages)} pages, {bad} problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
