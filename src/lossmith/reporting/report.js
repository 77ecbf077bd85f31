(function () {
  "use strict";
  var data = JSON.parse(document.getElementById("report-data").textContent);
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  var ids = Object.keys(data.charts);

  // Each theme's colours as dotted layout keys, so that the same table serves drawing and redrawing.
  function theme(isDark) {
    var ink = isDark ? "#e6e9ec" : "#1d2126";
    var grid = isDark ? "#333a43" : "#e3e6ea";
    return {
      "font.color": ink,
      "xaxis.gridcolor": grid, "yaxis.gridcolor": grid,
      "xaxis.linecolor": ink, "yaxis.linecolor": ink,
      "xaxis.zerolinecolor": ink,
      "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": grid, "modebar.activecolor": ink,
      "hoverlabel.bgcolor": isDark ? "#1c2026" : "#ffffff", "hoverlabel.font.color": ink
    };
  }

  function draw(id) {
    var chart = data.charts[id];
    var curve = id !== "chart-differences";
    var layout = Object.assign({
      autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      hovermode: curve ? "x unified" : "closest", font: {size: 13, family: "system-ui, sans-serif"}
    }, chart.layout);
    layout.margin = Object.assign({l: 56, r: 12, t: 10, b: 48}, chart.layout.margin);
    layout.xaxis = Object.assign({automargin: true, nticks: 7, zeroline: false}, chart.layout.xaxis);
    layout.xaxis.title.font = {size: 13};
    layout.yaxis = Object.assign({automargin: true, zeroline: false}, chart.layout.yaxis);
    if (layout.yaxis.title) { layout.yaxis.title.font = {size: 13}; }
    // Plotly's button that uploads a chart to its makers' server is off, and has no address to upload to.
    var config = {
      responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]
    };
    return Plotly.newPlot(id, chart.data, layout, config).then(function () {
      return Plotly.relayout(id, theme(dark.matches));
    });
  }

  function recolour(isDark) {
    ids.forEach(function (id) { Plotly.relayout(id, theme(isDark)); });
  }

  function toggle(button) {
    var arm = Number(button.dataset.arm);
    var shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    ids.forEach(function (id) {
      var traces = [];
      data.charts[id].data.forEach(function (trace, index) { if (trace.meta === arm) { traces.push(index); } });
      if (traces.length) { Plotly.restyle(id, {visible: shown}, traces); }
    });
  }

  ids.forEach(draw);
  document.querySelectorAll(".legend button").forEach(function (button) {
    button.addEventListener("click", function () { toggle(button); });
  });
  dark.addEventListener("change", function (event) { recolour(event.matches); });
  window.addEventListener("beforeprint", function () { recolour(false); });
  window.addEventListener("afterprint", function () { recolour(dark.matches); });
}());
