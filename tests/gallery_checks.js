// What tests/test_gallery_browser.py asks a page: functions that list what is wrong.

// Texts of pictures that leave the box they stand in, or run into another text of it.
window.spilled = () => [...document.querySelectorAll(".picture g")].flatMap((group) => {
  const rect = group.querySelector(":scope > rect"), texts = [...group.querySelectorAll(":scope > text")];
  if (!rect) return [];
  const outer = rect.getBoundingClientRect(), inner = texts.map((text) => text.getBoundingClientRect());
  const leaves = (r) => r.left < outer.left || r.right > outer.right + 0.5 || r.top < outer.top - 2 || r.bottom > outer.bottom + 2;
  const meets = (a, b) => b.left < a.right - 1 && a.left < b.right - 1 && b.top < a.bottom - 5 && a.top < b.bottom - 5;
  const bad = texts.filter((_, i) => leaves(inner[i]) || inner.some((other, j) => j < i && meets(inner[i], other)));
  return bad.map((text) => text.textContent);
});

// Elements that reach beyond the window, where nothing around them scrolls.
window.wide = () => [...document.querySelectorAll("body *")]
  .filter((e) => !e.closest(".scroll, .pictures, pre, svg, .skip") && e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.id || e.className || e.tagName);

// Texts of pictures and charts that are shown in less than 8 pixels.
window.tiny = () => [...document.querySelectorAll("svg text")].filter((text) => {
  const svg = text.closest("svg"), scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  return svg.checkVisibility() && parseFloat(getComputedStyle(text).fontSize) * scale < 8;
}).map((text) => text.textContent);

// What a screen reader would have no name for.
window.unnamed = () => [...document.querySelectorAll("a, button, input, select, [role], [tabindex='0']")]
  .filter((e) => !(e.textContent.trim() || e.getAttribute("aria-label") || e.labels?.length || e.getAttribute("aria-labelledby")))
  .map((e) => e.outerHTML.slice(0, 80));

// Texts with a contrast below 4.5:1.
window.faint = () => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (colour) => rgb(colour).map((v) => linear(v / 255)).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => {
    const [bright, dark] = [light(a), light(b)].sort((x, y) => y - x);
    return (bright + 0.05) / (dark + 0.05);
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "white";
  };
  const drawn = [...document.querySelectorAll(".picture text")].filter((text) => {
    const rect = text.parentElement.querySelector(":scope > rect"), fill = rect && getComputedStyle(rect).fill;
    return ratio(getComputedStyle(text).fill, fill && fill !== "none" ? fill : behind(text)) < 4.5;
  });
  const written = [...document.querySelectorAll("main *, header *")].filter((e) => {
    const own = [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    return own && !e.closest("svg") && e.checkVisibility() && ratio(getComputedStyle(e).color, behind(e)) < 4.5;
  });
  return [...drawn, ...written].map((e) => e.textContent.slice(0, 40));
};
