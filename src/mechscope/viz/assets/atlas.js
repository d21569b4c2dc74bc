// The panel for documents of kind "atlas": a bar to search by head, kind, neuron or token; heads by kind and importance;
// where all heads look; neurons with what they respond to and promote. One head and one neuron are chosen at a time.

PANELS.atlas = (article, doc) => {
  const heads = headSection(doc), neurons = neuronSection(doc);
  const section = (id, title, caption, ...parts) => el("section", { id }, el("h2", { tabindex: -1 }, title), caption && el("p", { class: "caption" }, caption), ...parts);
  const bar = finder(doc, {
    head: (which) => { heads.choose(which); heads.node.scrollIntoView({ block: "start" }); },
    neuron: (which) => { neurons.choose(which); neurons.node.scrollIntoView({ block: "nearest" }); },
  });
  article.append(
    el("h1", {}, doc.title),
    el("p", { class: "verdict" }, doc.verdict),
    el("dl", { class: "figures" }, Object.entries(doc.summary).map(([name, [value, about]]) => el("div", {}, el("dt", {}, name), el("dd", {}, value), el("p", {}, about)))),
    bar.node,
    section("heads", "Heads by kind", null, heads.node),
    section("attention", "Where every head looks", heads.view.how, heads.view.choice, el("div", { class: "patterns" }, heads.view.gallery, heads.view.large)),
    section("neurons", "Neurons", doc.notes.neurons ? null : neurons.about, doc.neurons.length ? neurons.node : el("p", {}, (doc.notes.neurons || ["No neurons were asked for."]).join(" "))),
    el("p", { class: "keys" }, el("kbd", {}, "/"), " search   ", el("kbd", {}, "\u2190"), el("kbd", {}, "\u2191"), el("kbd", {}, "\u2192"), el("kbd", {}, "\u2193"),
      " move in the map, the patterns and the list of neurons   ", el("kbd", {}, "["), el("kbd", {}, "]"), " previous and next prompt   ", el("kbd", {}, "Esc"), " leave the search"),
    ...closing(doc).flat(),
  );
  heads.start();
  neurons.start();
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "/") { event.preventDefault(); bar.focus(); }
    if ((event.key === "[" || event.key === "]") && doc.prompts.length) heads.view.turn(event.key === "]" ? 1 : -1);
  });
};

// The search: "3.2" and "neuron 3.217" name one, "head 3" and "layer 3" the heads of a layer; a kind's name gives its
// heads; anything else is sought in the tokens that neurons respond to and promote and that heads write on the prompts.

const FOUND = 40;

function finder(doc, go) {
  const names = headNames(doc), where = new Map(doc.neurons.map((neuron, i) => [neuron.name, i]));
  const text = (token) => String(token).toLowerCase();
  const tokensOf = doc.neurons.map((neuron) => ({
    peaks: [...new Set(neuron.examples.filter((example) => !example.range).map((example) => doc.words[example.ids[example.peak]]))],
    promotes: (neuron.promotes || []).map(([token]) => token),
    suppresses: (neuron.suppresses || []).map(([token]) => token),
  }));
  const writtenBy = names.map(({ row, head }) => [...new Set(doc.prompts.flatMap((prompt) => (prompt.writes ? prompt.writes[row][head] : []).flatMap(([, , tokens]) => tokens.map(([token]) => token))))]);
  const headRow = (which, about) => ({ what: `head ${names[which].name}`, about, go: () => go.head(which) });
  let rows = [], at = 0;
  const list = el("div", { class: "found", role: "listbox", id: "found", "aria-label": "Found", hidden: true });
  const input = el("input", {
    type: "search", role: "combobox", "aria-controls": "found", "aria-expanded": "false", autocomplete: "off", spellcheck: "false",
    placeholder: "Search: 3.2, induction, neuron 3.217, a token", "aria-label": "Search heads, kinds, neurons and tokens",
    oninput: () => { at = 0; show(); }, onfocus: () => show(),
    onkeydown: (event) => {
      if (event.key === "Escape") { input.value = ""; close(); input.blur(); return; }
      if (event.key === "Enter" && rows[at]) { event.preventDefault(); rows[at].go(); close(); input.blur(); return; }
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step || !rows.length) return;
      event.preventDefault();
      at = clamp(at + step, 0, rows.length - 1);
      mark();
    },
    onblur: () => setTimeout(close, 150),
  });

  function sought(words) {
    const asked = words.trim().toLowerCase(), found = [];
    if (!asked) return found;
    const named = asked.match(/^(head|neuron|n|l|h)?\s*(\d+)\s*[.h/]\s*(\d+)$/);
    if (named) {
      const name = `${named[2]}.${named[3]}`, neuron = named[1] === "neuron" || named[1] === "n";
      const which = names.findIndex((head) => head.name === name);
      if (which >= 0 && !neuron) found.push({ what: `head ${name}`, about: kindsOf(doc, which).join(", ") || "of no kind", go: () => go.head(which) });
      if (where.has(name)) found.push({ what: `neuron ${name}`, about: tokensOf[where.get(name)].peaks.map(visible).join("  "), go: () => go.neuron(where.get(name)) });
      else if (neuron) found.push({ what: `neuron ${name}`, about: `is not on this page; make it with --neurons ${name}` });
      return found;
    }
    const whole = asked.match(/^(?:heads?|layer)(?:\s+(\d+)\s*\.?)?$/);
    if (whole) {
      const of = names.map((_, which) => which).filter((which) => whole[1] === undefined || names[which].name.startsWith(`${whole[1]}.`));
      of.sort((a, b) => (kindsOf(doc, b).length > 0) - (kindsOf(doc, a).length > 0) || a - b);
      return of.map((which) => headRow(which, kindsOf(doc, which).join(", ") || "of no kind"));
    }
    names.forEach((_, which) => {
      const kinds = kindsOf(doc, which).filter((kind) => kind.toLowerCase().includes(asked));
      if (kinds.length) found.push({ ...headRow(which, kinds.join(", ")), size: scoreOf(doc, kinds[0], which) });
    });
    found.sort((a, b) => b.size - a.size);
    const [responds, writes, heads] = [[], [], []];
    const fits = (token) => (asked.length < 2 ? text(token).trim() === asked : text(token).includes(asked));
    doc.neurons.forEach((neuron, i) => {
      const row = (how, token) => ({ what: `neuron ${neuron.name}`, about: [`${how} `, tokenMark(token)], go: () => go.neuron(i) });
      const { peaks, promotes, suppresses } = tokensOf[i];
      const peak = peaks.find(fits), up = promotes.find(fits), down = suppresses.find(fits);
      if (peak !== undefined) responds.push(row("responds to", peak));
      else if (up !== undefined) writes.push(row("promotes", up));
      else if (down !== undefined) writes.push(row("suppresses", down));
    });
    writtenBy.forEach((tokens, which) => {
      const token = tokens.find(fits);
      if (token !== undefined) heads.push(headRow(which, ["writes ", tokenMark(token)]));
    });
    return [...found, ...responds, ...writes, ...heads];
  }
  function mark() {
    list.querySelectorAll("[role=option]").forEach((row, i) => { row.setAttribute("aria-selected", i === at); if (i === at) row.scrollIntoView({ block: "nearest" }); });
  }
  function show() {
    const all = sought(input.value);
    rows = all.slice(0, FOUND);
    list.hidden = !input.value.trim();
    input.setAttribute("aria-expanded", String(!list.hidden));
    list.replaceChildren(...rows.map((row) => el("div", { role: "option", onmousedown: () => { if (row.go) row.go(); close(); } }, el("code", {}, row.what), el("span", {}, row.about))),
      ...(all.length > FOUND ? [el("p", {}, `and ${count(all.length - FOUND)} more`)] : []),
      ...(all.length ? [] : [el("p", {}, "Nothing on this page has that in its name, its kinds, the tokens it responds to or the tokens it promotes or writes.")]));
    rows = rows.filter((row) => row.go);
    mark();
  }
  const close = () => { list.hidden = true; input.setAttribute("aria-expanded", "false"); };
  return {
    node: el("div", { class: "finder", role: "search" }, input, el("nav", {}, [["heads", "Heads"], ["attention", "Attention"], ["neurons", "Neurons"]].map(([id, name]) => el("a", { href: `#${id}` }, name))),
      el("span", { class: "keys" }, el("kbd", {}, "/"), " to search"), list),
    focus: () => { input.focus(); input.select(); },
  };
}

const placeOf = (doc, which) => { const { row, head } = headNames(doc)[which]; return [row, head]; };
const kindsOf = (doc, which) => { const [row, head] = placeOf(doc, which); return doc.labels[row][head]; };
const scoreOf = (doc, name, which) => { const [row, head] = placeOf(doc, which); return doc.kinds.find((kind) => kind.name === name).score[row][head]; };
