"use strict";
// Pages work without this file, but for captions and the playground: it keeps them fresh and saves clicks.
const $ = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

async function post(url, fields) {
  const body = new URLSearchParams(fields), keepalive = body.toString().length < 60000;  // Survives the page.
  const request = { method: "POST", body, keepalive, headers: { accept: "application/json" } };
  const answer = await fetch(url, request).catch(() => { throw Object.assign(new Error("The page's server does not answer."), { away: true }); });
  const type = answer.headers.get("content-type") || "";
  const value = type.includes("json") ? await answer.json() : { error: (await answer.text()).slice(0, 300) };
  if (!answer.ok) throw new Error(value.error);
  return value;
}

// The parts of the page that the server renders now replace those here, where they differ.
async function refresh(etag) {
  const answer = await fetch(location.href, { headers: etag ? { "if-none-match": etag } : {}, cache: "no-store" });
  tell(answer.status === 404 ? "This run is no longer there." : "");
  if (!answer.ok) return etag;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of all("[data-part]")) {
    const fresh = page.getElementById(part.id);
    if (!fresh || fresh.outerHTML === part.outerHTML) continue;
    const log = $("pre", part), top = log && log.scrollTop + log.clientHeight < log.scrollHeight - 8 ? log.scrollTop : 1e9;
    const focused = part.contains(document.activeElement) ? all("a, button, pre", part).indexOf(document.activeElement) : -1;
    part.replaceWith(document.adoptNode(fresh));
    if (focused >= 0) all("a, button, pre", fresh)[focused]?.focus({ preventScroll: true });
    if (log) $("pre", fresh).scrollTop = top;
  }
  const runs = $("#state .running") !== null;
  if (ran !== runs) location.reload();  // A run that has ended, or begun again, has other parts.
  ran = runs;
  return answer.headers.get("etag");
}
let ran = $("#state .running") !== null;
// What keeps the page from being fresh, above it; what it shows may no longer be so.
function tell(text) {
  const note = $("#away") || document.createElement("p");
  note.id = "away"; note.className = "note error"; note.setAttribute("role", "alert");
  if (note.textContent !== text) note.textContent = text;  // It is read aloud when it changes.
  if (!text) note.remove(); else if (!note.isConnected) $("main").prepend(note);
  document.body.classList.toggle("away", text !== "");
}
if ($("[data-live]")) {
  const every = Number($("[data-live]").dataset.live);
  if ($("#log pre")) $("#log pre").scrollTop = 1e9;
  let etag = null;
  const turn = async () => {
    if (!document.hidden) { try { etag = await refresh(etag); } catch { tell("The page's server does not answer; below is what it said last."); } }
    setTimeout(turn, every);
  };
  setTimeout(turn, every);
}

// Training: what a preset sets, and the plan below the form.
const train = $("#train");
if (train) {
  const presets = JSON.parse(train.dataset.presets), about = $("#about-preset"), first = about.textContent;
  const choose = () => {
    const preset = presets[train.elements.preset.value];
    about.textContent = preset ? preset.about : first;
    for (const field of all("[data-default]", train)) {
      const value = preset?.values[field.name] ?? field.dataset.default;
      if (field.tagName === "SELECT") field.options[0].text = value ? `default: ${value}` : "default";
      else field.placeholder = value;
    }
  };
  train.elements.preset.addEventListener("change", choose);
  choose();
  let changes = 0;
  const stale = () => { changes += 1; if ($("#plan form")) $("#plan").replaceChildren(); };
  train.addEventListener("input", stale);
  train.addEventListener("submit", async event => {
    event.preventDefault();
    const button = $("#show-plan"), said = $("#planning"), asked = changes;
    button.disabled = true; said.textContent = "Reading the images and the base …"; $("#plan").replaceChildren();
    try {
      const answer = await fetch("/plan", { method: "POST", body: new URLSearchParams(new FormData(train)) });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const plan = $("#plan", page) || $("main", page);
      if (asked === changes) {
        $("#plan").replaceChildren(...[...plan.childNodes].map(node => document.adoptNode(node)));
        $("#plan").scrollIntoView({ block: "nearest" });
      }
      said.textContent = asked === changes ? "" : "The settings have changed since; show the plan again.";
    } catch (error) { said.textContent = "The page's server does not answer."; }
    button.disabled = false;
  });
}

// Captions: saved when a field is left, or with Enter; Shift-Enter begins another caption of the image.
function edit(set) {
  const folder = set.dataset.folder, said = $("#said", set), fields = all(".card textarea", set);
  const name = field => field.closest(".card").dataset.name;
  let kept = new Set();
  const show = ({ captions, edits }) => {
    for (const field of fields) if (name(field) in captions) {
      field.value = field.dataset.seen = captions[name(field)];
      field.classList.remove("unsaved"); field.classList.add("saved"); delete field.dataset.again;
    }
    $("#edits", set).textContent = edits || ""; $("#undo", set).disabled = !edits;
    count();
  };
  const send = async (url, values, describe) => {
    try { const answer = await post(url, values); show(answer); said.textContent = describe(answer); }
    catch (error) { said.textContent = error.message; return error; }
    return null;
  };
  const save = async changed => {
    // What the server did not hear of is sent again; what it refused waits for another text.
    const now = new Set(changed.map(([field]) => field)), again = fields.filter(field => field.dataset.again && !now.has(field));
    changed = [...changed, ...again.map(field => [field, field.value])];
    const before = new Map(changed.map(([field]) => [field, field.value]));
    const changes = Object.fromEntries(changed.map(([field, text]) => [name(field), [field.dataset.seen, text]]));
    const error = await send(`/captions/${folder}`, { changes: JSON.stringify(changes) }, () => changed.length > 1 ? `${changed.length} captions saved` : "saved");
    for (const [field, text] of changed) {
      field.classList.toggle("unsaved", error !== null); delete field.dataset.again;
      if (!error?.away) continue;
      field.dataset.again = "1";
      if (field.value === before.get(field)) field.value = text;  // A replacement is not in the field yet.
    }
  };
  const count = () => {
    const counts = new Map();
    for (const field of fields) for (const tag of new Set(field.value.split(/[,\n]/).map(part => part.trim()).filter(Boolean))) counts.set(tag, (counts.get(tag) || 0) + 1);
    const pressed = $("#tags [aria-pressed=true]", set)?.dataset.tag;
    $("#tags", set).replaceChildren(...[...counts].filter(([, number]) => number > 1).sort((one, two) => two[1] - one[1]).slice(0, 60).map(([tag, number]) => {
      const button = document.createElement("button"), times = document.createElement("span");
      button.type = "button"; button.dataset.tag = tag; button.setAttribute("aria-pressed", String(tag === pressed));
      times.className = "soft"; times.textContent = number;
      button.append(tag.length > 40 ? `${tag.slice(0, 39)}… ` : `${tag} `, times);
      return button;
    }));
    filter();
  };
  const filter = () => {
    const text = $("#find", set).value.toLowerCase(), tag = $("#tags [aria-pressed=true]", set)?.dataset.tag;
    for (const field of fields) {
      const has = kept.has(field) || `${name(field)}\n${field.value}`.toLowerCase().includes(text);
      field.closest(".card").hidden = !has || (tag !== undefined && !kept.has(field) && !field.value.split(/[,\n]/).some(part => part.trim() === tag));
    }
  };
  $("#tags", set).addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    const on = button.getAttribute("aria-pressed") !== "true";
    for (const other of all("button", $("#tags", set))) other.setAttribute("aria-pressed", String(on && other === button));
    filter();
  });
  $("#find", set).addEventListener("input", () => { kept.clear(); filter(); });
  for (const field of fields) {
    field.addEventListener("blur", () => {
      if (field.value !== field.dataset.seen) save([[field, field.value]]);
      else { field.classList.remove("unsaved"); delete field.dataset.again; }
    });
    field.addEventListener("keydown", event => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); field.blur(); } });
  }
  addEventListener("pagehide", () => document.activeElement?.blur());
  addEventListener("beforeunload", event => { if (fields.some(field => field.classList.contains("unsaved"))) event.preventDefault(); });
  $("#replace-all", set).addEventListener("click", () => {
    const text = $("#find", set).value, other = $("#replace", set).value;
    // As the filter does: only what is shown, in any case.
    const pattern = new RegExp(text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "gi");
    const changed = text ? fields.filter(field => !field.closest(".card").hidden).map(field => [field, field.value.replace(pattern, () => other)]).filter(([field, value]) => value !== field.value) : [];
    // They stay in sight, also where the filter would hide them now.
    kept = new Set(changed.map(([field]) => field));
    if (changed.length) save(changed); else said.textContent = text ? `no caption contains “${text}”` : "write what to find";
  });
  const undo = () => send(`/undo/${folder}`, {}, ({ captions, kept: stay }) => {
    const names = Object.keys(captions), what = names.length > 3 ? `${names.length} captions` : names.join(", ");
    return stay.length ? `${stay.join(", ")} stays: another program changed it since` : `undone: ${what}`;
  });
  $("#undo", set).addEventListener("click", undo);
  count();
  document.addEventListener("keydown", event => {
    const writing = event.target.matches("input, textarea");
    if ((event.ctrlKey || event.metaKey) && event.key === "z" && !writing && !$("#undo", set).disabled) { event.preventDefault(); undo(); }
  });
}
const waiting = $("[data-load]");
if (waiting) {
  fetch(waiting.dataset.load).then(answer => answer.text()).then(text => {
    const page = new DOMParser().parseFromString(text, "text/html"), set = $("#set", page) || $("main", page);
    waiting.replaceWith(document.adoptNode(set));
    if (set.dataset.folder) edit(set);
  }).catch(() => { waiting.textContent = "The page's server does not answer; reload."; });
} else if ($("#set[data-folder]")) edit($("#set"));

// Side by side: one zoom for all panes.
const panes = all(".pane");
if (panes.length) {
  let scale = 1, x = 0, y = 0, from = null;
  const draw = () => {
    scale = Math.min(16, Math.max(1, scale));
    for (const pane of panes) {
      const image = $("img", pane);
      x = Math.min(0, Math.max(x, pane.clientWidth - image.clientWidth * scale));
      y = Math.min(0, Math.max(y, Math.min(0, pane.clientHeight - image.clientHeight * scale)));
    }
    for (const pane of panes) $("img", pane).style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
  };
  const zoom = (factor, atX, atY) => {
    const next = Math.min(16, Math.max(1, scale * factor));
    x = atX - (atX - x) * next / scale; y = atY - (atY - y) * next / scale; scale = next; draw();
  };
  for (const pane of panes) {
    pane.addEventListener("wheel", event => { event.preventDefault(); const box = pane.getBoundingClientRect(); zoom(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top); }, { passive: false });
    pane.addEventListener("pointerdown", event => { from = [event.clientX - x, event.clientY - y]; pane.setPointerCapture(event.pointerId); });
    pane.addEventListener("pointermove", event => { if (from) { [x, y] = [event.clientX - from[0], event.clientY - from[1]]; draw(); } });
    for (const end of ["pointerup", "pointercancel"]) pane.addEventListener(end, () => { from = null; });
    pane.addEventListener("keydown", event => {
      const moves = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
      if (event.key === "+" || event.key === "=") zoom(1.25, pane.clientWidth / 2, pane.clientHeight / 2);
      else if (event.key === "-") zoom(0.8, pane.clientWidth / 2, pane.clientHeight / 2);
      else if (event.key === "0") { scale = 1; x = y = 0; draw(); }
      else if (moves[event.key]) { x += moves[event.key][0]; y += moves[event.key][1]; draw(); }
      else return;
      event.preventDefault();
    });
  }
}

// Rating by keys.
if ($("[data-keys]")) document.addEventListener("keydown", event => {
  if (!event.target.matches("input, select, textarea")) $(`[data-key=${CSS.escape(event.key)}]`)?.click();
});

// The playground.
const paint = $("#paint");
if (paint) {
  const rows = all(".adapter", paint);
  const update = () => rows.forEach((row, number) => {
    $("output", row).textContent = Number($("input", row).value).toFixed(2);
    if (number) row.hidden = !$("select", rows[number - 1]).value || rows[number - 1].hidden;
    for (const field of all("select, input", row)) field.disabled = row.hidden;  // What is not seen is not drawn.
  });
  const draw = async () => {
    if (paint.dataset.busy) { paint.dataset.again = "1"; return; }
    paint.dataset.busy = "1"; $("#painted").classList.add("waiting");
    $("#painting").textContent = $("#painted").hidden ? "Drawing … the first image waits for the base to load." : "Drawing …";
    try {
      const { images } = await post("/paint", new FormData(paint));
      all("img", $("#painted")).forEach((image, number) => { image.src = images[number]; });
      $("#painted").hidden = false; $("#painting").textContent = "";
    } catch (error) { $("#painting").textContent = error.message; }
    $("#painted").classList.remove("waiting"); delete paint.dataset.busy;
    if (paint.dataset.again) { delete paint.dataset.again; draw(); }
  };
  paint.addEventListener("input", update);
  paint.addEventListener("change", event => { if (event.target.type === "range" && !$("#painted").hidden) draw(); });
  paint.addEventListener("submit", event => { event.preventDefault(); draw(); });
  update();
}
