// What browser.py evaluates in a page: a line for each problem of its layout, at most eight of a kind.
async width => {
  // Unfold the page; wait for images and fonts.
  document.querySelectorAll("details").forEach(e => { e.open = true; });
  document.querySelectorAll("[loading=lazy]").forEach(e => { e.loading = "eager"; });
  const images = [...document.images];
  await Promise.all([document.fonts.ready, ...images.map(i => i.decode().catch(() => 0))]);

  const problems = [], count = {}, root = document.documentElement, css = getComputedStyle;
  const say = (kind, what) => {
    count[kind] = (count[kind] ?? 0) + 1;
    if (count[kind] <= 8) problems.push(`${kind}: ${what}`);
  };
  // A phone lays a page without a viewport out at 980 px.
  const widest = Math.max(root.scrollWidth, innerWidth);
  if (widest > width + 1) say("overflow", `page ${widest} px, window ${width} px`);
  for (const i of images)
    if (!i.naturalWidth) say("image", `does not show: ${i.alt || i.src.slice(0, 60)}`);

  const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data].map(v => v / 255);
  };
  const luminance = c => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) =>
    sum + w * (c[i] <= 0.04045 ? c[i] / 12.92 : ((c[i] + 0.055) / 1.055) ** 2.4), 0.05);
  const blend = (c, under) => [0, 1, 2].map(i => c[3] * c[i] + (1 - c[3]) * under[i]);
  const ground = e => {
    if (e) return blend(rgba(css(e).backgroundColor), ground(e.parentElement));
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    return dark && css(root).colorScheme.includes("dark") ? [0.07, 0.07, 0.07] : [1, 1, 1];
  };

  const texts = [], range = document.createRange();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement, words = node.data.trim().replace(/\s+/g, " ").slice(0, 40);
    if (!words || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const style = css(e), svg = e instanceof SVGElement, name = JSON.stringify(words);
    range.selectNodeContents(node);
    let boxes = [...range.getClientRects()].filter(r => r.width > 0.5 && r.height > 0.5);
    for (let a = svg ? e.ownerSVGElement : e; a && a !== document.body; a = a.parentElement) {
      const s = css(a), r = a.getBoundingClientRect();
      if (a.clientWidth <= 1 && s.overflow === "hidden") boxes = [];  // for screen readers alone
      if (s.display === "inline" || s.overflowX === "visible") continue;
      const outside = boxes.some(b => b.right > r.right + 2 || b.left < r.left - 2);
      if (/hidden|clip/.test(s.overflowX) && outside) say("cut off", name);
      if (/auto|scroll/.test(s.overflowX))  // the rest can be reached
        boxes = boxes.filter(b => b.right <= r.right + 2);
    }
    if (!boxes.length) continue;
    if (boxes.some(b => b.left < -1 || b.right > innerWidth + 1)) say("off the page", name);
    const scale = svg ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1;
    const size = parseFloat(style.fontSize) * scale, smallest = svg ? 5 : 9;
    if (size < smallest - 0.01) say("too small", `${name}, ${size.toFixed(1)} px`);
    if (!svg) {
      const under = ground(e), paper = luminance(under);
      const ink = luminance(blend(rgba(style.color), under));
      const contrast = Math.max(ink, paper) / Math.min(ink, paper);
      if (contrast < 4.495) say("too faint", `${name}, contrast ${contrast.toFixed(2)}`);
    }
    for (const b of boxes) {  // glyphs keep to about the middle of their line
      const spare = Math.max(0, b.height - size) / 2, {left, right} = b;
      texts.push({node, name, left, right, top: b.top + spare, bottom: b.bottom - spare});
    }
  }
  texts.sort((a, b) => a.top - b.top).forEach((a, i) => {
    for (const b of texts.slice(i + 1)) {
      if (b.top > a.bottom - 2) break;
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      if (a.node !== b.node && across > 2) say("overlap", `${a.name} and ${b.name}`);
    }
  });
  return problems;
}
