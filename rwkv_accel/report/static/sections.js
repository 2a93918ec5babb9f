"use strict";
// Everything but the curves: cards, summary table, samples, tokens by loss, recipe, messages.

const MOST_CARDS = 4;

function drawOverview(place, view) {
  place.replaceChildren(view.runs.length > MOST_CARDS ? overviewTable(view.runs)
    : make("div", { class: "heads" }, view.runs.map((run) => make("div", { class: "card head-run" },
      view.runs.length > 1 ? make("h3", {}, swatch(run.index), run.name) : null,
      make("div", { class: "cards" }, run.headline.map((card) => make("div", {},
        make("div", { class: "label" }, card.label),
        make("div", { class: "value num" + (card.label === "status" ? " " + card.value : card.value === "not finite" ? " lost" : "") }, card.value),
        make("span", { class: "note num" }, card.note)))), warnings(run)))));
}

// Many runs: a line each.
function overviewTable(runs) {
  const labels = [...new Set(runs.flatMap((run) => run.headline.map((card) => card.label)))];
  const cell = (run, label) => run.headline.find((card) => card.label === label) || { value: "–", note: "" };
  return make("div", { class: "card pad scroll" }, make("table", { class: "data" },
    make("thead", {}, make("tr", {}, make("th", {}), labels.map((label) => make("th", {}, label)))),
    make("tbody", {}, runs.map((run) => make("tr", {},
      make("th", { scope: "row" }, swatch(run.index), " ", run.name),
      labels.map((label) => make("td", { class: "num" }, cell(run, label).value,
        make("span", { class: "note block" }, cell(run, label).note))))))),
  runs.map(warnings));
}

function warnings(run) {
  return run.notes.length ? make("ul", { class: "warnings" }, run.notes.map((note) => make("li", {}, note))) : null;
}

function runHeads(runs) {
  return runs.map((run) => make("th", {}, swatch(run.index), " ", run.name));
}

function drawComparison(place, view) {
  const runs = view.visible();
  const labels = [...new Set(view.runs.flatMap((run) => Object.keys(run.summary)))];
  const rows = labels.map((label) => {
    const texts = runs.map((run) => run.summary[label]);
    const best = label.includes("loss") && runs.length > 1 ? lowest(texts) : null;
    return make("tr", {}, make("th", { scope: "row" }, label), texts.map((text) =>
      make("td", { class: "num" + (best !== null && parseFloat(text) === best ? " best" : "") }, text || "–")));
  });
  place.replaceChildren(make("h2", {}, view.runs.length > 1 ? "Runs side by side" : "Summary"),
    make("div", { class: "card pad scroll" }, make("table", { class: "data" },
      runs.length > 1 ? make("thead", {}, make("tr", {}, make("th", {}), runHeads(runs))) : null,
      make("tbody", {}, rows))));
}

function lowest(texts) {
  const values = texts.map(parseFloat).filter((value) => !Number.isNaN(value));
  return values.length > 1 ? Math.min(...values) : null;
}

function drawConfig(place, view) {
  const runs = view.visible();
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  place.hidden = !keys.length;
  const differs = (key) => new Set(runs.map((run) => run.config[key])).size > 1;
  const changed = (key) => runs.some((run) => run.changed.includes(key));
  const wanted = view.configFilter.toLowerCase();
  const choices = runs.length > 1 ? { differing: "what differs", changed: "not the default", all: "everything" }
    : { changed: "not the default", all: "everything" };
  if (!(view.configChoice in choices)) view.configChoice = Object.keys(choices)[0];
  const isShown = (key) => key.toLowerCase().includes(wanted) &&
    (wanted || view.configChoice === "all" || (view.configChoice === "changed" ? changed(key) : differs(key)));
  const rows = keys.filter(isShown).map((key) => make("tr", { class: runs.length > 1 && differs(key) ? "differs" : "" },
    make("th", { scope: "row", class: "mono" }, key),
    runs.map((run) => make("td", { class: "mono" }, key in run.config ? run.config[key] : "–",
      view.configChoice === "all" && run.changed.includes(key) ? [" ", make("span", { class: "badge" }, "changed")] : null))));
  const body = make("div", { class: "card pad scroll" }, rows.length ? make("table", { class: "data" },
    runs.length > 1 ? make("thead", {}, make("tr", {}, make("th", {}), runHeads(runs))) : null,
    make("tbody", {}, rows)) : make("span", { class: "note" }, "nothing"));
  const old = place.querySelector("input");
  if (old) {
    // The field keeps its cursor while someone types.
    place.querySelector(".card").replaceWith(body);
    place.querySelector(".switch").replaceWith(configSwitch(choices, place, view));
    return;
  }
  place.replaceChildren(make("h2", {}, "Recipe", configSwitch(choices, place, view), make("input", {
    type: "search", placeholder: "find a key", "aria-label": "Find a key", value: view.configFilter,
    oninput: (event) => { view.configFilter = event.target.value; drawConfig(place, view); },
  })), body);
}

function configSwitch(choices, place, view) {
  return make("span", { class: "switch" }, Object.entries(choices).map(([name, text]) => make("button", {
    type: "button", "aria-pressed": String(view.configChoice === name),
    onclick: () => { view.configChoice = name; drawConfig(place, view); },
  }, text)));
}

function drawSamples(place, view) {
  const runs = view.visible().filter((run) => run.samples.length);
  const steps = [...new Set(runs.flatMap((run) => run.samples.map((sample) => sample.step)))].sort((a, b) => a - b);
  place.hidden = !steps.length;
  if (!steps.length) return;
  const chosen = view.sampleStep === null ? steps.length - 1 : nearest(steps, view.sampleStep);
  const label = make("span", { class: "num" }, `step ${Format.integer(steps[chosen])}`);
  const list = make("div", {});
  const show = (step) => list.replaceChildren(...samplePrompts(runs, step, view.allSamples));
  const slider = make("input", {
    type: "range", min: 0, max: steps.length - 1, value: chosen, "aria-label": "Step of the samples",
    oninput: (event) => {
      view.sampleStep = steps[event.target.value];
      label.textContent = `step ${Format.integer(view.sampleStep)}`;
      show(view.sampleStep);
    },
  });
  slider.hidden = label.hidden = view.allSamples || steps.length < 2;
  place.replaceChildren(make("h2", {}, "Samples", slider, label, make("button", {
    type: "button", "aria-pressed": String(view.allSamples), hidden: steps.length < 2,
    onclick: () => { view.allSamples = !view.allSamples; drawSamples(place, view); },
  }, "all steps")), list);
  show(steps[chosen]);
}

function samplePrompts(runs, step, isAll) {
  const prompts = [...new Set(runs.flatMap((run) => run.samples.flatMap((s) => s.answers.map((a) => a.prompt))))];
  return prompts.map((prompt) => make("div", { class: "card prompt" }, make("h3", {}, prompt),
    make("div", { class: "answers" }, runs.flatMap((run) => {
      const upTo = run.samples.filter((sample) => isAll || sample.step <= step);
      return (isAll ? upTo : upTo.slice(-1)).flatMap((sample) => sample.answers
        .filter((answer) => answer.prompt === prompt)
        .map((answer) => make("div", { class: "answer", style: { borderColor: `var(--run-${run.index % 8})` } },
          make("div", { class: "text" }, answer.text || make("span", { class: "note" }, "(nothing)")),
          make("span", { class: "note num" }, `${run.name}, step ${Format.integer(sample.step)}`,
            answer.stopped ? null : make("span", { class: "cut" }, ", cut at the length limit")))));
    }))));
}

// Half of the shade is reached at 1.7 nats, a probability of 18%.
function heat(loss) {
  return `rgba(${colour("--heat")}, ${(0.75 * (1 - Math.exp(-Math.max(loss, 0) / 2.5))).toFixed(3)})`;
}

function drawTokens(place, view) {
  const runs = view.visible().filter((run) => run.token_losses && Array.isArray(run.token_losses.documents));
  place.hidden = !runs.length;
  const scale = [0, 1, 2, 4, 8].map((loss) => [make("i", { style: { background: heat(loss) } }), String(loss)]);
  // The same document of all runs side by side.
  const most = Math.max(0, ...runs.map((run) => run.token_losses.documents.length));
  const documents = [...Array(most).keys()].flatMap((number) => runs
    .filter((run) => number < run.token_losses.documents.length)
    .map((run) => tokenDocument(run, run.token_losses.documents[number], number)));
  place.replaceChildren(make("h2", {}, "Tokens by loss", make("span", { class: "heat" }, scale, " nats")),
    make("div", { class: runs.length > 1 ? "documents" : "" }, documents));
}

function tokenDocument(run, document, number) {
  const facts = make("div", { class: "facts", "aria-live": "polite" },
    make("span", { class: "note" }, "Point at a token: its loss, its probability, and what the model expected."));
  let picked = null;
  const pick = (span, token) => {
    if (picked) picked.classList.remove("picked");
    picked = span;
    span.classList.add("picked");
    facts.replaceChildren(...tokenFacts(token));
  };
  const words = make("div", { class: "words" }, document.tokens.map((token) => {
    const isTarget = token.loss !== null && token.loss !== undefined;
    const span = make("span", { class: isTarget && token.target ? "target" : "context" }, token.text);
    if (isTarget) {
      if (token.target) span.style.background = heat(token.loss);
      span.addEventListener("pointerenter", () => pick(span, token));
      span.addEventListener("click", () => pick(span, token));
    }
    return span;
  }));
  return make("div", { class: "card document" },
    make("h3", {}, swatch(run.index), ` ${run.name}, document ${number + 1} `, make("span", { class: "note num" },
      `${run.token_losses.weights}: mean loss ${Format.number(document.loss)} over ${Format.integer(document.num_targets)} targets` +
      (document.num_left_out ? `, the first ${Format.integer(document.tokens.length)} tokens` : ""))),
    words, facts);
}

function tokenFacts(token) {
  const shown = (text) => JSON.stringify(text);
  const rows = (token.expected || []).map(([text, share]) => make("span", { class: "mono" },
    make("i", { class: "bar", style: { width: Math.max(2, 60 * share) + "px" } }), `${shown(text)} ${Format.percent(share)} `));
  return [make("div", {}, make("b", { class: "mono" }, shown(token.text)), ` loss ${Format.number(token.loss)}, ` +
    `probability ${Format.percent(Math.exp(-token.loss))}` + (token.target ? "" : ", not a target of the loss")),
  make("div", {}, "expected:", rows)];
}

function drawMessages(place, view) {
  const runs = view.visible().filter((run) => run.events.length || run.messages.length);
  const opened = new Set([...place.querySelectorAll("details[open]")].map((details) => details.dataset.run));
  place.hidden = !runs.length;
  place.replaceChildren(make("h2", {}, "Course of the run"), ...runs.map((run) => make("div", { class: "card pad" },
    view.runs.length > 1 ? make("h3", {}, swatch(run.index), " ", run.name) : null,
    make("pre", { class: "mono" }, run.events.join("\n")),
    make("details", { "data-run": run.name, open: opened.has(run.name) },
      make("summary", {}, `all ${run.messages.length} messages`),
      make("pre", { class: "mono" }, run.messages.join("\n"))))));
}
