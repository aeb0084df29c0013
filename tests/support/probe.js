// What a page looks like to its reader, told to the document around it. Runs before anything else of the page, and so
// before its content security policy, which stays in force for all the rest.
(() => {
  const errors = [];
  addEventListener('error', e => errors.push(e.message || `not loaded: ${e.target.outerHTML}`), true);

  // Any CSS colour as [r, g, b, a] in 0..1: the browser paints it and is asked what came out.
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const known = new Map();
  const rgba = colour => {
    if (!known.has(colour)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      known.set(colour, [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255));
    }
    return known.get(colour);
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = element => {
    if (!element) return [1, 1, 1];
    const own = rgba(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own : over(own, behind(element.parentElement));
  };
  // Relative luminance and contrast as WCAG 2 defines them.
  const luminance = colour => {
    const [r, g, b] = colour.map(v => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = element => {
    const style = getComputedStyle(element);
    const ground = behind(element);
    const ink = over(rgba(element instanceof SVGElement ? style.fill : style.color), ground);
    const [light, dark] = [luminance(ink), luminance(ground)].sort((a, b) => b - a);
    return (light + 0.05) / (dark + 0.05);
  };
  const hasText = element =>
    element.getClientRects().length > 0 && [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());

  const report = () => {
    const all = [...document.body.querySelectorAll('*')];
    const seen = {
      width: innerWidth,
      scroll_width: document.documentElement.scrollWidth,
      dark: matchMedia('(prefers-color-scheme: dark)').matches,
      scripts: document.scripts.length - 1, // this one
      handlers: all.filter(e => e.getAttributeNames().some(name => name.startsWith('on'))).length,
      images: [...document.images].map(image => image.naturalWidth),
      pictures: [...document.querySelectorAll('svg[role=img]')].map(svg => svg.getAttribute('aria-label')),
      tables: [...document.querySelectorAll('table')].map(table =>
        [...table.rows].map(row => [...row.cells].map(cell => cell.textContent))),
      hints: all.map(e => e.getAttribute('title')).filter(Boolean),
      text: document.body.innerText,
      faint: all.filter(hasText).filter(e => contrast(e) < 4.5)
        .map(e => `${contrast(e).toFixed(2)}: ${e.outerHTML.slice(0, 120)}`),
      resources: performance.getEntriesByType('resource').map(entry => entry.name),
      errors,
    };
    const bytes = new TextEncoder().encode(JSON.stringify(seen));
    parent.document.documentElement.dataset.seen = btoa([...bytes].map(b => String.fromCharCode(b)).join(''));
  };
  addEventListener('load', () => window.lookAfter ? setTimeout(report, window.lookAfter) : report());
})();
