"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const points = data.points;
  const tip = document.getElementById("tip");
  const make = (tag, text, parent) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };

  // What is under the pointer, in the plots and in the heatmap.
  const show = (places, x, y) => {
    tip.replaceChildren();
    const first = points[places[0]];
    first.lines.forEach((line, at) => make(at ? "span" : "b", line, tip));
    const others = places.slice(1, 5).map((at) => points[at].lines[0]);
    if (places.length > 1) make("span", "at the same place: " + others.join("; ") + (places.length > 5 ? "; ..." : ""), tip);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 18) + "px";
  };
  let hot = [];
  const heat = (places) => {
    hot.forEach((one) => one.classList.remove("hot"));
    hot = places.flatMap((at) => [...document.querySelectorAll(`.mark[data-i="${at}"], tr[data-i="${at}"]`)]);
    hot.forEach((one) => one.classList.add("hot"));
  };
  const hide = () => { tip.hidden = true; heat([]); };

  document.querySelectorAll("svg.scatter").forEach((svg) => {
    const marks = [...svg.querySelectorAll(".mark")];
    // The page's own words come from the tip: the browser's would stand beside them.
    marks.forEach((mark) => mark.querySelector("title").remove());
    const nearest = (event) => {
      const seen = marks.filter((mark) => mark.style.display !== "none").map((mark) => {
        const box = mark.getBoundingClientRect();
        return [Math.hypot(box.x + box.width / 2 - event.clientX, box.y + box.height / 2 - event.clientY), mark];
      });
      const least = Math.min(...seen.map((one) => one[0]));
      if (!(least < 26)) { hide(); return; }
      const spot = seen.find((one) => one[0] === least)[1].getAttribute("transform");
      const places = marks.filter((mark) => mark.getAttribute("transform") === spot).map((mark) => +mark.dataset.i);
      places.reverse();
      heat(places);
      show(places, event.clientX, event.clientY);
    };
    svg.addEventListener("pointermove", nearest);
    svg.addEventListener("pointerdown", nearest);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  });
  addEventListener("scroll", hide, { passive: true });

  // Methods can be taken out of the plots, the more so where they lie over each other.
  document.querySelectorAll(".legend [data-key]").forEach((key) => {
    const marks = document.querySelectorAll(`.scatter .mark.${key.dataset.key}`);
    if (["best", "front", "plphp", "unpruned"].includes(key.dataset.key)) return;
    const button = make("button");
    button.type = "button";
    button.title = "show or hide";
    button.append(...key.childNodes);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", on);
      marks.forEach((mark) => { mark.style.display = on ? "" : "none"; });
    });
    key.append(button);
  });

  // The heatmap of the reader's choice.
  const figures = {
    kl_mean: ["mean KL, nats", (v) => (v > 0 && v < 0.00005 ? "<0.0001" : v.toFixed(4)), Math.sqrt],
    kv_ratio: ["KV held", (v) => (100 * v).toFixed(1) + " %", (v) => v],
    // Of these more is better, and warm is worse everywhere.
    top1_agreement: ["top-1 agreement", (v) => (100 * v).toFixed(1) + " %", (v) => -v],
    accuracy: ["accuracy", (v) => (100 * v).toFixed(1) + " %", (v) => -v],
    decode_ratio: ["decode against unpruned", (v) => v.toFixed(2) + "x", (v) => -v],
  };
  const choices = document.getElementById("choices");
  if (choices) {
    const swept = points.filter((point) => Object.keys(point.knobs).length);
    const knobs = Object.keys(swept[0].knobs);
    const unique = (values) => [...new Set(values)].sort((a, b) => a - b || (a < b ? -1 : a > b ? 1 : 0));
    const values = Object.fromEntries(knobs.map((knob) => [knob, unique(swept.map((point) => point.knobs[knob]))]));
    const start = points[data.best] || swept[Math.floor(swept.length / 2)];
    const select = (name, options, value) => {
      const label = make("label", name, choices);
      const made = make("select", undefined, label);
      options.forEach(([key, text]) => { make("option", text, made).value = key; });
      made.value = value;
      made.addEventListener("change", () => draw(made));
      return made;
    };
    const same = (list) => list.map((one) => [one, one]);
    const known = Object.keys(figures).filter((name) => swept.some((point) => point[name] !== null));
    const methods = [...new Set(swept.map((point) => point.method))];
    const figure = select("figure", known.map((name) => [name, figures[name][0]]), known[0]);
    const method = methods.length > 1 ? select("method", same(methods), methods[0]) : { value: methods[0] };
    const down = select("down", same(knobs), choices.dataset.down);
    const across = select("across", same(knobs), choices.dataset.across);
    const others = Object.fromEntries(knobs.map((knob) => [knob, select(knob, same(values[knob]), start.knobs[knob])]));
    let axes = [down.value, across.value];

    const draw = (changed) => {
      // Both sides the same knob makes no table: the other side takes the knob that was given up.
      if (down.value === across.value) (changed === down ? across : down).value = axes[changed === down ? 0 : 1];
      axes = [down.value, across.value];
      knobs.forEach((knob) => { others[knob].parentElement.hidden = axes.includes(knob); });
      const [name, text, scale] = figures[figure.value];
      const fixed = knobs.filter((knob) => !axes.includes(knob));
      const of = swept.filter((point) => point.method === method.value);
      const all = of.map((point) => point[figure.value]).filter((v) => v !== null).map(scale);
      const low = Math.min(...all), high = Math.max(...all);
      const table = document.getElementById("heat");
      const [head, body] = [table.tHead, table.tBodies[0]];
      head.replaceChildren();
      body.replaceChildren();
      const first = make("tr", undefined, head);
      make("th", `${axes[0]} \\ ${axes[1]}`, first);
      values[axes[1]].forEach((by) => make("th", by, first));
      values[axes[0]].forEach((row) => {
        const line = make("tr", undefined, body);
        make("th", row, line);
        values[axes[1]].forEach((by) => {
          const point = of.find((one) => one.knobs[axes[0]] === row && one.knobs[axes[1]] === by
            && fixed.every((knob) => one.knobs[knob] === others[knob].value));
          const cell = make("td", undefined, line);
          if (!point) { cell.className = "none"; cell.textContent = "–"; return; }
          const v = point[figure.value];
          cell.textContent = v === null ? "N/A" : text(v);
          if (v !== null && high > low) cell.style.setProperty("--t", (scale(v) - low) / (high - low));
          if (figure.value !== "kv_ratio") make("small", (100 * point.kv_ratio).toFixed(0) + " %", cell);
          cell.dataset.i = points.indexOf(point);
          cell.classList.toggle("keeps", ["yes", "by mean"].includes(point.keeps));
          cell.classList.toggle("best", cell.dataset.i === String(data.best));
        });
      });
      const small = figure.value === "kv_ratio" ? "" : " and, small, the cache held";
      document.getElementById("shown").textContent = `Shown: ${name}${small}. Warmer: worse. Bold: keeps the limit; outlined: recommended.`;
    };
    draw(down);
    const table = document.getElementById("heat");
    table.addEventListener("pointermove", (event) => {
      const cell = event.target.closest("td[data-i]");
      if (!cell) { hide(); return; }
      heat([+cell.dataset.i]);
      show([+cell.dataset.i], event.clientX, event.clientY);
    });
    table.addEventListener("pointerleave", hide);
  }

  // The table: sorted by a click on a heading, and less of it.
  const table = document.getElementById("points");
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make("button", head.textContent);
    button.type = "button";
    head.replaceChildren(button);
    const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      [...head.parentElement.cells].forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
      // What is not known stays at the end, whichever way.
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return (up ? 1 : -1) * compare(x, y);
      });
      body.append(...rows);
    });
  });
  const filters = document.getElementById("filters");
  const label = make("label", "show", filters);
  const choice = make("select", undefined, label);
  const tests = { "all": () => true, "on a front": (row) => "front" in row.dataset,
    "keeping the limit": (row) => ["yes", "by mean"].includes(points[row.dataset.i].keeps) };
  [...new Set(points.map((point) => point.method))].filter((name) => name !== "unpruned")
    .forEach((name, at, all) => { if (all.length > 1) tests["method " + name] = (row) => points[row.dataset.i].method === name; });
  Object.keys(tests).forEach((name) => make("option", name, choice));
  const count = make("span", "", filters);
  count.className = "soft";
  const filter = () => {
    [...body.rows].forEach((row) => { row.hidden = row.className !== "whole" && !tests[choice.value](row); });
    count.textContent = [...body.rows].filter((row) => !row.hidden && row.className !== "whole").length + " settings";
  };
  choice.addEventListener("change", filter);
  filter();
})();
