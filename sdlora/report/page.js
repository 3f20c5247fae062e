// Sliders over steps and strengths, and a wiper between base and style. Without it, all images are shown.
(() => {
  const samples = document.querySelector("#samples");
  const figures = [...samples.querySelectorAll("figure[data-step]")];
  if (!figures.length) return;
  const dials = samples.querySelector(".dials");
  const start = { step: Number(dials.dataset.step), strength: Number(dials.dataset.strength) };
  const axes = {};
  for (const name of ["step", "strength"]) {
    const values = [...new Set(figures.map((one) => Number(one.dataset[name])))].sort((a, b) => a - b);
    const input = dials.querySelector(`[name=${name}]`);
    input.max = values.length - 1;
    const wanted = name === "step" && !start.step ? values.at(-1) : start[name];
    const near = values.map((value) => Math.abs(value - wanted));
    input.value = near.indexOf(Math.min(...near));
    input.closest("label").hidden = values.length < 2;
    input.addEventListener("input", show);
    axes[name] = { values, input };
  }

  function chosen(name) {
    return axes[name].values[axes[name].input.value];
  }

  // The image at the chosen step and strength, or the nearest that was drawn, the step first.
  function distance(figure) {
    const away = (name) => Math.abs(Number(figure.dataset[name]) - chosen(name));
    return away("step") * 1000 + away("strength");
  }

  function show() {
    for (const [name, { input }] of Object.entries(axes)) {
      input.setAttribute("aria-valuetext", `${name} ${chosen(name)}`);
      input.closest("label").querySelector("output").textContent = chosen(name);
    }
    for (const stage of samples.querySelectorAll(".stage")) {
      const own = [...stage.querySelectorAll("figure[data-step]")];
      if (!own.length) continue;
      const best = own.reduce((a, b) => (distance(b) < distance(a) ? b : a));
      for (const figure of own) figure.hidden = figure !== best;
      stage.querySelector(".shown").textContent = best.querySelector("figcaption").textContent;
    }
  }

  for (const stage of samples.querySelectorAll(".stage")) {
    const tiles = stage.querySelector(".tiles");
    if (!tiles.querySelector("figure[data-step]") || !tiles.querySelector(".base")) continue;
    const wiper = document.createElement("input");
    Object.assign(wiper, { type: "range", min: 0, max: 100, value: 40, className: "wiper" });
    wiper.setAttribute("aria-label", "Base on the left, style on the right");
    const wipe = () => tiles.style.setProperty("--wipe", `${wiper.value}%`);
    wiper.addEventListener("input", wipe);
    tiles.append(wiper, Object.assign(document.createElement("span"), { className: "edge" }));
    tiles.classList.add("wiped");
    wipe();
  }
  samples.classList.add("live");
  dials.hidden = false;
  show();
})();
