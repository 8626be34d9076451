// Questions to a page in a browser; test_report_page.py and test_play.py ask them.
const all = (selector) => [...document.querySelectorAll(selector)];
const unfold = () => { all("details").forEach((e) => { e.open = true; }); return new Promise(requestAnimationFrame); };
const LABELS = "th, td, figcaption, nav a, .legend span, .head div, .fact span, h1, h2, h3";

// The words of labels that are broken in two, and those that stand outside the window.
function words() {
  const broken = [], outside = [];
  for (const e of all(LABELS)) {
    const head = e.closest("thead");
    if (head && head.clientWidth <= 1) continue;  // kept for screen readers; each card repeats it
    const texts = document.createTreeWalker(e, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      if (texts.currentNode.parentElement.closest("code")) continue;  // long paths have no other place to break
      for (const found of texts.currentNode.data.matchAll(/\p{L}+/gu)) {
        const range = document.createRange();
        range.setStart(texts.currentNode, found.index);
        range.setEnd(texts.currentNode, found.index + found[0].length);
        const boxes = [...range.getClientRects()].filter((box) => box.width > 1);
        if (boxes.length > 1) broken.push(found[0]);
        if (boxes.some((box) => box.left < 0 || box.right > innerWidth)) outside.push(found[0]);
      }
    }
  }
  return { broken, outside };
}
// Frames that hide a part of their content at the side.
const cut = () => all("*").filter((e) => e.clientWidth > 1 && e.scrollWidth > e.clientWidth + 1 &&
  getComputedStyle(e).overflowX !== "visible").map((e) => e.className);
const fits = () => document.documentElement.scrollWidth <= innerWidth;
const visible = () => all("td, canvas, svg").filter((e) => {
  const box = e.getBoundingClientRect();
  return box.width > 20 && box.height > 10;
}).length;
const axes = () => all("svg:not(.flg)").map((s) => [...s.querySelectorAll(".name")].map((t) => t.textContent));
const smallest = () => Math.min(...all("svg text").map((t) => t.getBoundingClientRect().height));
// Whether no two labels of a horizontal axis touch.
const apart = () => all("svg").every((s) => {
  const boxes = [...s.querySelectorAll("text[text-anchor=middle]:not(.name)")].map((t) => t.getBoundingClientRect());
  return boxes.every((box, i) => !i || box.left > boxes[i - 1].right);
});
const focused = (selector) => { const e = document.querySelector(selector); e.focus(); return document.activeElement === e; };
const cue = (selector) => getComputedStyle(document.querySelector(selector), "::before").content;
const seek = (frame) => { document.getElementById("seek").value = frame; document.getElementById("seek").oninput(); };
const painted = () => all("canvas").every((c) =>
  c.getContext("2d").getImageData(0, 0, c.width, c.height).data.some((v, i) => i % 4 < 3 && v > 0));
// The least contrast of a text with the nearest background behind it.
function contrast() {
  const light = (text) => {
    const parts = text.match(/[\d.]+/g).slice(0, 3).map((v) => v / 255);
    const [r, g, b] = parts.map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    const own = getComputedStyle(e).backgroundColor;
    return own === "rgba(0, 0, 0, 0)" ? behind(e.parentElement) : own;
  };
  const texts = all("body *").filter((e) => e.checkVisibility() && !e.disabled &&
    [...e.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()));
  return Math.min(...texts.map((e) => {
    const style = getComputedStyle(e);
    const [a, b] = [light(e instanceof SVGElement ? style.fill : style.color), light(behind(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
}
