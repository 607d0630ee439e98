(async () => {
  const root = document.documentElement;
  const holders = [...document.querySelectorAll("div.plot")];
  const packed = document.getElementById("plotly");
  if (!holders.length) return;
  try {
    if (!window.Plotly) {
      const bytes = Uint8Array.from(atob(packed.textContent.trim()), (letter) => letter.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      const library = document.createElement("script");
      library.textContent = await new Response(stream).text();
      document.head.append(library);
    }
    if (!window.Plotly) throw new Error("plotly.js did not start");
  } catch (error) {
    root.classList.add("no-plots");
    document.querySelectorAll("figure details").forEach((numbers) => { numbers.open = true; });
    return;
  }
  const paint = (value, style) => {
    if (typeof value === "string") {
      const found = /^var\((--[a-z]+)\)$/.exec(value);
      return found ? style.getPropertyValue(found[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => paint(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, paint(item, style)]));
    }
    return value;
  };
  const draw = () => {
    const style = getComputedStyle(root);
    for (const holder of holders) {
      const figure = paint(JSON.parse(holder.nextElementSibling.textContent), style);
      window.Plotly.react(holder, figure.data, figure.layout, {
        responsive: true, displaylogo: false, displayModeBar: false, showTips: false, scrollZoom: false });
    }
  };
  draw();
  const watch = new ResizeObserver((entries) => entries.forEach((entry) => window.Plotly.Plots.resize(entry.target)));
  holders.forEach((holder) => watch.observe(holder));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  matchMedia("print").addEventListener("change", () => {
    draw();
    holders.forEach((holder) => window.Plotly.Plots.resize(holder));
  });
})();
