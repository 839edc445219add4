"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const element = (tag, properties = {}, ...children) => {
    const { role, label, ...rest } = properties;
    const made = Object.assign(document.createElement(tag), rest);
    if (role) made.setAttribute("role", role);
    if (label) made.setAttribute("aria-label", label);
    made.append(...children);
    return made;
  };
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const tables = data.colormaps.map((entry) => ({ ...entry, table: bytes(entry.table) }));
  const signedTable = data.signed === null ? null : bytes(data.signed);
  const SMALL = 256; // the longest side of a picture in the grid of all maps

  // What is shown. All of it is in the fragment of the address, but for what is as at the beginning.

  const first = data.items[0];
  const several = data.items.length > 1 || first.methods.length * first.classes.length > 1;
  const beginning = {
    input: 0, view: "one", picture: "hidden", swipe: 50, opacity: data.opacity, threshold: 0, zoom: 1, x: 0.5, y: 0.5,
    colormap: 0, grey: false, a: `${data.sentence.find((piece) => piece.class !== null)?.class ?? 0}.0`, b: first.methods.length > 1 ? "0.1" : "1.0",
  };
  const state = { ...beginning };
  const item = () => data.items[state.input];
  let pointed = null; // the class of a word that the pointer is over
  const chosen = (pane) => {
    const [own, method] = state[pane].split(".").map(Number), kind = pane === "a" && pointed !== null ? pointed : own;
    return { class: Math.min(kind, item().classes.length - 1), method: Math.min(method, item().methods.length - 1) };
  };
  let timer = 0;
  const remember = () => {
    clearTimeout(timer); // browsers allow few changes of the address in a time
    timer = setTimeout(() => {
      const changed = Object.entries(state).filter(([name, value]) => value !== beginning[name]);
      const text = new URLSearchParams(changed.map(([name, value]) => [name, String(value)])).toString();
      try {
        if (location.hash.slice(1) !== text) history.replaceState(null, "", `#${text}`);
      } catch { /* a frame of a notebook has no address of its own */ }
    }, 100);
  };
  const recall = () => {
    Object.assign(state, beginning);
    const allowed = { view: ["one", "two", "all"], picture: ["hidden", "beside", "swipe"] };
    const limits = {
      input: [0, data.items.length - 1], swipe: [0, 100], opacity: [0, 100], threshold: [0, 1], zoom: [1, 8], x: [0, 1], y: [0, 1],
      colormap: [0, tables.length - 1],
    };
    for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
      if (name in limits && text !== "" && Number.isFinite(Number(text))) state[name] = clamp(Number(text), ...limits[name]);
      else if (allowed[name]?.includes(text)) state[name] = text;
      else if ((name === "a" || name === "b") && /^\d+\.\d+$/.test(text)) state[name] = text;
      else if (name === "grey") state.grey = text === "true";
    }
    state.input = Math.round(state.input);
    state.colormap = Math.round(state.colormap);
  };

  // Maps. The weights of the neighbours when n values are resized to m: the cubic kernel with a = -1/2, edges renormalised.

  const cubic = (x) => {
    x = Math.abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  };
  const weights = (n, m) => {
    const scale = n / m, width = Math.max(scale, 1), rows = [];
    for (let i = 0; i < m; i++) {
      const centre = (i + 0.5) * scale;
      const start = Math.max(0, Math.trunc(centre - 2 * width + 0.5));
      const end = Math.min(n, Math.trunc(centre + 2 * width + 0.5));
      const row = [];
      for (let j = start; j < end; j++) row.push(cubic((j - centre + 0.5) / width));
      const total = row.reduce((sum, value) => sum + value, 0);
      rows.push([start, row.map((value) => value / total)]);
    }
    return rows;
  };
  const resize = (values, [h, w], [H, W]) => {
    const across = weights(w, W), down = weights(h, H);
    const wide = new Float32Array(h * W), out = new Float32Array(H * W);
    for (let y = 0; y < h; y++) for (let x = 0; x < W; x++) {
      const [start, row] = across[x];
      let sum = 0;
      for (let k = 0; k < row.length; k++) sum += row[k] * values[y * w + start + k];
      wide[y * W + x] = sum;
    }
    for (let y = 0; y < H; y++) {
      const [start, row] = down[y];
      for (let x = 0; x < W; x++) {
        let sum = 0;
        for (let k = 0; k < row.length; k++) sum += row[k] * wide[(start + k) * W + x];
        out[y * W + x] = sum;
      }
    }
    return out;
  };

  // A map has two bytes for each position: 0 to 65534 for its range, 65535 where it is undefined. In between, [0, 1].
  const cellsOf = (map) => (map.raw ??= new Uint16Array(bytes(map.values).buffer));
  const valuesOf = (map, size) => {
    const raw = cellsOf(map), key = size.join();
    if (!map[key]) {
      const defined = Float32Array.from(raw, (level) => level < 65535);
      const values = resize(Float32Array.from(raw, (level) => (level < 65535 ? level / 65534 : 0)), map.shape, size);
      if (defined.includes(0)) {
        const share = resize(defined, map.shape, size);
        for (let i = 0; i < values.length; i++) values[i] = share[i] >= 0.5 ? values[i] / share[i] : NaN;
      }
      map[key] = values;
    }
    return map[key];
  };
  const numberOf = (share, signed) => (signed ? 2 * clamp(share, 0, 1) - 1 : clamp(share, 0, 1));
  const tableOf = (method) => (method.signed && signedTable !== null ? signedTable : tables[state.colormap].table);

  // Pictures.

  const pixelsOf = (entry, size) => (entry[size.join()] ??= load(entry, ...size));
  const load = async (entry, height, width) => {
    const image = new Image();
    image.src = entry.image;
    await image.decode();
    const [h, w] = [image.naturalHeight, image.naturalWidth];
    const enlarged = h < height && !entry.tiny;
    const canvas = Object.assign(document.createElement("canvas"), enlarged ? { width: w, height: h } : { width, height });
    const context = canvas.getContext("2d");
    Object.assign(context, { imageSmoothingEnabled: h > height, imageSmoothingQuality: "high" });
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    if (!enlarged) return pixels;
    const out = new Uint8ClampedArray(4 * height * width).fill(255);
    for (let c = 0; c < 3; c++) {
      const channel = resize(Float32Array.from({ length: h * w }, (_, i) => pixels[4 * i + c]), [h, w], [height, width]);
      for (let i = 0; i < channel.length; i++) out[4 * i + c] = channel[i];
    }
    return out;
  };

  // A map over a picture, pixel by pixel as torchcam.utils.overlay_map draws it; what is below the threshold is left out.

  const compose = (pixels, [height, width], method, values, swiped) => {
    const out = new Uint8ClampedArray(pixels), table = tableOf(method), last = table.length / 4 - 1;
    const opacity = state.opacity / 100, { threshold, grey } = state;
    const over = new Uint8Array(height * width);
    for (let i = 0; i < values.length; i++) {
      const value = values[i], at = 4 * i;
      if (grey) out[at] = out[at + 1] = out[at + 2] = (19595 * out[at] + 38470 * out[at + 1] + 7471 * out[at + 2] + 32768) >> 16;
      over[i] = Math.abs(numberOf(value, method.signed)) >= threshold;
      if (Number.isNaN(value) || !over[i]) continue;
      const place = 4 * clamp(Math.floor(value * (last + 1)), 0, last), alpha = (opacity * table[place + 3]) / 255;
      for (let c = 0; c < 3; c++) out[at + c] += alpha * (table[place + c] - out[at + c]);
    }
    if (threshold > 0) {
      for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
        const i = y * width + x, here = over[i];
        const apart = (j, inside) => inside && over[j] !== here;
        if (apart(i - 1, x > 0) || apart(i + 1, x < width - 1) || apart(i - width, y > 0) || apart(i + width, y < height - 1)) {
          out.fill(here ? 255 : 0, 4 * i, 4 * i + 3);
        }
      }
    }
    if (swiped) {
      const cut = Math.round((state.swipe / 100) * width);
      for (let y = 0; y < height; y++) {
        const row = 4 * y * width;
        out.set(pixels.subarray(row, row + 4 * cut), row);
        if (cut > 0 && cut < width) out.fill(255, row + 4 * cut, row + 4 * cut + 4);
      }
    }
    return { out, share: over.reduce((sum, one) => sum + one, 0) / over.length };
  };
  const paint = (canvas, pixels, [height, width]) => {
    Object.assign(canvas, { width, height });
    canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels), width, height), 0, 0);
  };

  // The part of the picture that is in sight: where it begins, and its size, as shares.

  const part = () => {
    const size = 1 / state.zoom;
    return { left: clamp(state.x - size / 2, 0, 1 - size), top: clamp(state.y - size / 2, 0, 1 - size), size };
  };
  const move = (x, y) => Object.assign(state, { x: clamp(x, 0, 1), y: clamp(y, 0, 1) });

  // The panes.

  const letters = ["A", "B"], words = [];
  const panes = ["a", "b"].map((name, number) => {
    const pane = { name, number, spot: null };
    pane.picture = element("canvas", { role: "img", label: "The untouched picture" });
    pane.canvas = element("canvas", { role: "img" });
    pane.cross = element("span", { className: "cross", hidden: true });
    pane.beside = element("div", { className: "stage" }, pane.picture);
    pane.stage = element("div", { className: "stage map", tabIndex: 0, role: "application" }, pane.canvas, pane.cross);
    pane.probe = element("output", { className: "probe" });
    pane.caption = element("span");
    pane.layers = element("small");
    pane.area = element("small");
    pane.trust = element("div", { className: "trust", hidden: true });
    const figcaption = element("figcaption", {}, pane.caption, pane.layers, pane.area);
    figcaption.setAttribute("aria-live", "polite");
    pane.bar = element("canvas", { role: "img", label: "colour bar" });
    pane.ticks = element("div");
    pane.unit = element("span");
    const scale = element("div", { className: "scale" }, pane.bar, pane.ticks, pane.unit);
    const stages = element("div", { className: "stages" }, pane.beside, pane.stage);
    const figure = element("figure", {}, stages, pane.probe, figcaption, scale, pane.trust);
    pane.groups = [["class", "Class"], ["method", "Method"]].map(([kind, title]) => {
      const legend = element("legend", { textContent: title }), choices = element("div", { className: "choices" });
      return { kind, title, legend, choices, fieldset: element("fieldset", {}, legend, choices) };
    });
    const lists = element("div", {}, ...pane.groups.map((group) => group.fieldset));
    pane.section = element("section", { className: "pane", label: `Map ${letters[number]}` }, figure, lists);
    listen(pane);
    return pane;
  });

  function listen(pane) {
    const { stage } = pane;
    const place = (event) => {
      const box = stage.getBoundingClientRect(), { left, top, size } = part();
      return [left + (size * (event.clientX - box.left)) / box.width, top + (size * (event.clientY - box.top)) / box.height];
    };
    let held = null;
    stage.addEventListener("pointerdown", (event) => {
      if (state.zoom === 1) return;
      held = { x: event.clientX, y: event.clientY, from: [state.x, state.y] };
      stage.setPointerCapture(event.pointerId);
    });
    stage.addEventListener("pointermove", (event) => {
      if (held) {
        const box = stage.getBoundingClientRect(), { size } = part();
        move(held.from[0] - (size * (event.clientX - held.x)) / box.width, held.from[1] - (size * (event.clientY - held.y)) / box.height);
        look();
      }
      probe(pane, place(event), false);
    });
    for (const kind of ["pointerup", "pointercancel"]) stage.addEventListener(kind, () => { held = null; remember(); });
    stage.addEventListener("pointerleave", () => probe(pane, null, false));
    stage.addEventListener("dblclick", (event) => {
      const [x, y] = place(event);
      state.zoom = state.zoom > 1 ? 1 : 3;
      move(x, y);
      look();
    });
    stage.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return; // so do two fingers on a touchpad
      event.preventDefault();
      const [x, y] = place(event);
      state.zoom = clamp(state.zoom * Math.exp(-event.deltaY / 200), 1, 8);
      move(x, y);
      look();
    }, { passive: false });
    stage.addEventListener("keydown", (event) => {
      const [height, width] = item().size, step = event.shiftKey ? 10 : 1;
      const [x, y] = pane.spot ?? [0.5, 0.5];
      const to = {
        ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step],
      }[event.key];
      if (to) {
        const next = [clamp(x + (to[0] * width) / 100 / width, 0, 1), clamp(y + (to[1] * height) / 100 / height, 0, 1)];
        const { left, top, size } = part();
        if (next[0] < left || next[0] > left + size || next[1] < top || next[1] > top + size) move(...next);
        probe(pane, next, true);
      } else if (event.key === "+" || event.key === "=") state.zoom = clamp(state.zoom + 0.5, 1, 8);
      else if (event.key === "-") state.zoom = clamp(state.zoom - 0.5, 1, 8);
      else if (event.key === "0") state.zoom = 1;
      else if (event.key === "Escape") probe(pane, null, true);
      else return;
      event.preventDefault();
      look();
    });
  }

  // Say the value at a place of the picture.
  const probe = (pane, spot, marked) => {
    pane.spot = spot;
    pane.cross.hidden = spot === null || !marked;
    if (spot === null) { pane.probe.textContent = ""; return; }
    const { class: kind, method: number } = chosen(pane.name), method = item().methods[number], map = method.maps[kind];
    const [height, width] = item().size, [h, w] = map.shape;
    const at = (size, share) => clamp(Math.floor(share * size), 0, size - 1);
    const value = valuesOf(map, item().size)[at(height, spot[1]) * width + at(width, spot[0])];
    const level = cellsOf(map)[at(h, spot[1]) * w + at(w, spot[0])];
    const told = (share) => (Number.isNaN(share) ? "undefined" : numberOf(share, method.signed).toFixed(3));
    const cell = `, in row ${at(h, spot[1]) + 1} and column ${at(w, spot[0]) + 1} of ${h} × ${w}: ${told(level < 65535 ? level / 65534 : NaN)}`;
    pane.probe.textContent = `value ${told(value)}${h < height && w < width ? cell : ""}`;
    look();
  };

  // Show the part in sight, and where the marked place is in it.
  const look = () => {
    const { left, top, size } = part();
    const transform = state.zoom === 1 ? "" : `scale(${state.zoom}) translate(${-100 * left}%, ${-100 * top}%)`;
    byId("panes").classList.toggle("zoomed", state.zoom > 1);
    for (const pane of panes) {
      pane.canvas.style.transform = pane.picture.style.transform = transform;
      if (pane.spot) {
        pane.cross.style.left = `${(100 * (pane.spot[0] - left)) / size}%`;
        pane.cross.style.top = `${(100 * (pane.spot[1] - top)) / size}%`;
      }
    }
    label();
    remember();
  };

  const fill = (pane) => {
    const entries = { class: item().classes, method: item().methods };
    for (const { kind, title, legend, choices, fieldset } of pane.groups) {
      const isInSentence = kind === "class" && pane.number === 0 && words.length > 0;
      fieldset.hidden = isInSentence || (entries[kind].length < 2 && kind === "method");
      legend.textContent = state.view === "two" ? `${title}, map ${letters[pane.number]}` : title;
      choices.replaceChildren(...entries[kind].map((entry, index) => {
        const radio = element("input", { type: "radio", name: `${kind}-${pane.number}`, value: index });
        radio.checked = index === chosen(pane.name)[kind];
        radio.addEventListener("change", () => {
          const now = { ...chosen(pane.name), [kind]: index };
          state[pane.name] = `${now.class}.${now.method}`;
          show(pane);
          remember();
        });
        const row = element("label", { className: "choice" }, radio, element("span", { className: "name", textContent: entry.name }));
        for (const tag of entry.tags ?? []) row.append(element("span", { className: "tag", textContent: tag }));
        if (entry.value) row.append(element("span", { className: "value", textContent: entry.value }));
        if (typeof entry.share === "number") {
          const filled = element("span", { className: "fill" });
          filled.style.width = `${100 * entry.share}%`;
          row.append(filled);
        }
        return row;
      }));
    }
  };

  const show = async (pane) => {
    const { classes, methods, size } = item(), entry = item();
    const { class: kind, method: number } = chosen(pane.name);
    const asked = classes[kind], method = methods[number], map = method.maps[kind];
    pane.canvas.setAttribute("aria-label", `${method.name} map of ${asked.name}`);
    pane.stage.setAttribute("aria-label", "Map: arrow keys tell the value at a place, plus and minus zoom, 0 shows all");
    pane.caption.textContent = [`${method.name} of ${asked.name}`, asked.value, map.note].filter(Boolean).join(" · ");
    pane.layers.textContent = method.layers;
    const table = tableOf(method), count = table.length / 4;
    paint(pane.bar, table, [1, count]);
    const scale = data.scales[Number(method.signed)];
    pane.ticks.replaceChildren(...scale.ticks.map((tick) => element("span", { textContent: tick })));
    pane.unit.textContent = scale.label;
    pane.trust.hidden = !asked.trust || number > 0;
    if (asked.trust && number === 0) {
      pane.trust.dataset.verdict = asked.trust.verdict;
      const reasons = asked.trust.reasons.map((reason) => element("li", { textContent: reason }));
      pane.trust.replaceChildren(element("p", {}, element("strong", { textContent: asked.trust.headline })), element("ul", {}, ...reasons));
    }
    pane.beside.hidden = state.picture !== "beside";
    const pixels = await pixelsOf(entry, size);
    if (entry !== item()) return;
    const { out, share } = compose(pixels, size, method, valuesOf(map, size), state.picture === "swipe");
    paint(pane.canvas, out, size);
    paint(pane.picture, pixels, size);
    pane.area.textContent = state.threshold > 0 ? `${(100 * share).toFixed(1)}% of the picture at ${state.threshold} or beyond` : "";
    if (pane.spot) probe(pane, pane.spot, !pane.cross.hidden);
  };

  // A sentence: to point at a word is to see its map, to click on it or move to it by the arrow keys is to choose it.

  const choose = (kind) => {
    pointed = null;
    state.a = `${kind}.${chosen("a").method}`;
    markWord();
    show(panes[0]);
    remember();
  };
  const markWord = () => {
    for (const word of words) {
      const isChosen = word.kind === chosen("a").class;
      word.button.setAttribute("aria-checked", isChosen);
      word.button.tabIndex = isChosen ? 0 : -1;
    }
  };
  const point = (kind) => {
    pointed = kind;
    show(panes[0]);
  };
  for (const piece of data.sentence) {
    if (piece.class === null) { byId("sentence").append(piece.text); continue; }
    const text = piece.text.trim() || piece.text, start = piece.text.indexOf(text);
    const button = element("button", { type: "button", textContent: text, role: "radio" });
    button.addEventListener("click", () => choose(piece.class));
    button.addEventListener("mouseenter", () => point(piece.class));
    button.addEventListener("mouseleave", () => point(null));
    byId("sentence").append(piece.text.slice(0, start), button, piece.text.slice(start + text.length));
    words.push({ button, kind: piece.class });
  }
  byId("sentence").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const from = words.findIndex(({ button }) => button === document.activeElement);
    const next = event.key === "Home" ? 0 : event.key === "End" ? words.length - 1 : from + (step ?? NaN);
    if (from < 0 || !words[next]) return;
    event.preventDefault();
    words[next].button.focus();
    choose(words[next].kind);
  });

  // All maps: methods in columns, inputs and their classes in rows, the untouched picture first. Drawn when in sight.

  const waiting = new Map();
  const sight = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) draw(target);
  }, { rootMargin: "300px" });
  const smallSize = ({ size: [h, w] }) => [h, w].map((side) => Math.max(1, Math.round(side * Math.min(1, SMALL / Math.max(h, w)))));
  const draw = async (canvas) => {
    const { entry, method, kind } = waiting.get(canvas), size = smallSize(entry), pixels = await pixelsOf(entry, size);
    if (method === null) paint(canvas, pixels, size);
    else paint(canvas, compose(pixels, size, method, valuesOf(method.maps[kind], size), false).out, size);
    canvas.dataset.drawn = true;
  };
  const cell = (input, kind, number, label) => {
    const entry = data.items[input], method = number === null ? null : entry.methods[number];
    const [height, width] = smallSize(entry);
    const canvas = element("canvas", { role: "img", label, height, width });
    waiting.set(canvas, { entry, method, kind });
    if (method === null) return element("div", {}, canvas);
    const button = element("button", { type: "button", title: "show this map alone" }, canvas);
    button.addEventListener("click", () => {
      Object.assign(state, { input, view: "one", a: `${kind}.${number}` });
      render();
      panes[0].stage.focus();
    });
    return button;
  };
  const fillAll = () => {
    const heads = first.methods.map((method) => {
      const head = element("th", { scope: "col", textContent: method.name });
      head.append(element("small", { textContent: method.layers }));
      return head;
    });
    const body = element("tbody");
    data.items.forEach((entry, input) => {
      entry.classes.forEach((asked, kind) => {
        const told = [asked.name, asked.value].filter(Boolean).join(" · ");
        const title = element("th", { scope: "row", colSpan: entry.methods.length, textContent: told });
        const above = element("tr", {}, title), row = element("tr");
        if (kind === 0) {
          const picture = cell(input, 0, null, `${entry.name}, the untouched picture`);
          above.prepend(element("th", { scope: "rowgroup", textContent: data.items.length > 1 ? entry.name : "picture" }));
          row.append(element("td", { rowSpan: 2 * entry.classes.length - 1 }, picture));
        }
        entry.methods.forEach((method, number) => {
          row.append(element("td", {}, cell(input, kind, number, `${method.name} map of ${asked.name}`)));
        });
        body.append(above, row);
      });
    });
    byId("all").replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, element("td"), ...heads)), body));
  };
  const showAll = () => {
    if (!waiting.size) fillAll();
    for (const canvas of waiting.keys()) {
      sight.unobserve(canvas);
      sight.observe(canvas);
    }
  };

  // The picture of what is shown.

  const inSight = (canvas) => {
    const out = element("canvas", { width: canvas.width, height: canvas.height }), { left, top, size } = part();
    const [w, h] = [canvas.width, canvas.height];
    out.getContext("2d").drawImage(canvas, left * w, top * h, size * w, size * h, 0, 0, w, h);
    return out;
  };
  const joined = (canvases) => {
    const gap = 10, out = element("canvas");
    out.width = canvases.reduce((sum, one) => sum + one.width + gap, -gap);
    out.height = Math.max(...canvases.map((one) => one.height));
    const context = out.getContext("2d");
    context.fillStyle = getComputedStyle(document.body).backgroundColor;
    context.fillRect(0, 0, out.width, out.height);
    let x = 0;
    for (const one of canvases) { context.drawImage(one, x, 0); x += one.width + gap; }
    return out;
  };
  const grid = async () => {
    const gap = 10, line = 22, rows = [...byId("all").querySelectorAll("tbody tr")].slice(0, 120);
    const heads = [...byId("all").querySelectorAll("thead th")];
    const out = element("canvas"), context = out.getContext("2d");
    const places = [];
    let y = 2 * line, width = 0;
    for (const row of rows) {
      const cells = [...row.querySelectorAll("canvas")], has = row.querySelector("td[rowspan]") !== null;
      await Promise.all(cells.map(draw));
      if (!cells.length) {
        const titles = [...row.querySelectorAll("th")];
        titles.forEach((title, place) => places.push([title.textContent, (titles.length - 1 - place ? 0 : 1) * (SMALL + gap), y + 16]));
        y += line;
        continue;
      }
      cells.forEach((one, place) => {
        const x = (place + (has ? 0 : 1)) * (SMALL + gap);
        places.push([one, x, y]);
        width = Math.max(width, x + SMALL);
      });
      y += Math.max(...cells.map((one) => one.height)) + gap;
    }
    Object.assign(out, { width, height: y });
    const style = getComputedStyle(document.body);
    context.fillStyle = style.backgroundColor;
    context.fillRect(0, 0, width, y);
    Object.assign(context, { fillStyle: style.color, font: `14px ${style.fontFamily}` });
    heads.forEach((head, place) => {
      [head.firstChild.textContent, head.lastChild.textContent].forEach((text, row) => {
        context.fillText(text, (place + 1) * (SMALL + gap), (row + 1) * (line - 4), SMALL);
      });
    });
    for (const [what, x, top] of places) {
      if (typeof what === "string") context.fillText(what, x, top, x ? width - x : SMALL);
      else context.drawImage(what, x, top);
    }
    return out;
  };
  const download = async () => {
    const used = panes.slice(0, state.view === "two" ? 2 : 1);
    await Promise.all(state.view === "all" ? [] : used.map(show));
    const canvases = used.flatMap((pane) => [...(state.picture === "beside" ? [pane.picture] : []), pane.canvas]);
    const canvas = state.view === "all" ? await grid() : joined(canvases.map(inSight));
    const told = state.view === "all" ? ["all maps"] : used.flatMap((pane) => {
      const { class: kind, method } = chosen(pane.name);
      return [item().methods[method].name, item().classes[kind].name];
    });
    const name = [data.items.length > 1 && state.view !== "all" ? item().name : "", ...told].filter(Boolean).join("-");
    const link = element("a", { download: `${name.replace(/[^\p{L}\p{N}.+-]+/gu, "_").slice(0, 120)}.png` });
    link.href = URL.createObjectURL(await new Promise((resolve) => canvas.toBlob(resolve)));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  // The tools.

  const label = () => {
    for (const name of ["swipe", "opacity", "threshold", "zoom", "view", "picture", "input", "colormap"]) byId(name).value = state[name];
    byId("grey").checked = state.grey;
    const told = {
      swipe: `${state.swipe}%`, opacity: `${state.opacity}%`, threshold: state.threshold > 0 ? `≥ ${state.threshold}` : "off", zoom: `${+state.zoom.toFixed(1)}×`,
    };
    for (const [name, text] of Object.entries(told)) document.querySelector(`output[for=${name}]`).textContent = text;
  };
  const repaint = () => {
    if (state.view === "all") showAll();
    else panes.slice(0, state.view === "two" ? 2 : 1).forEach(show);
    look();
  };
  const render = () => {
    const all = state.view === "all";
    const isAlone = words.length > 0 && item().methods.length < 2;
    byId("panes").className = `panes ${state.view} ${state.picture}${isAlone ? " alone" : ""}`;
    byId("sentence").hidden = !words.length || all;
    markWord();
    byId("panes").hidden = all;
    byId("all").hidden = !all;
    byId("inputs").hidden = data.items.length < 2 || all;
    for (const tool of document.querySelectorAll(".single")) tool.hidden = all;
    byId("swiping").hidden = all || state.picture !== "swipe";
    byId("colours").hidden = tables.length < 2 || (signedTable !== null && item().methods.every((one) => one.signed));
    panes[1].section.hidden = state.view !== "two";
    for (const pane of panes) fill(pane);
    repaint();
  };
  for (const name of ["swipe", "opacity", "threshold", "zoom"]) {
    byId(name).addEventListener("input", (event) => {
      state[name] = Number(event.target.value);
      if (name === "zoom") look(); else repaint();
    });
  }
  for (const name of ["view", "picture", "input", "colormap"]) {
    byId(name).addEventListener("change", ({ target }) => {
      state[name] = name === "view" || name === "picture" ? target.value : Number(target.value);
      for (const pane of panes) probe(pane, null, false);
      render();
    });
  }
  byId("grey").addEventListener("change", ({ target }) => { state.grey = target.checked; repaint(); });
  byId("download").addEventListener("click", download);
  tables.forEach(({ name }, index) => byId("colormap").append(new Option(name, index)));
  data.items.forEach((entry, index) => byId("input").append(new Option(entry.name, index)));
  byId("views").hidden = !several;
  for (const [term, text] of data.about) byId("about").append(element("dt", { textContent: term }), element("dd", { textContent: text }));
  byId("panes").append(...panes.map((pane) => pane.section));
  window.addEventListener("hashchange", () => { recall(); render(); });
  recall();
  render();
})();
