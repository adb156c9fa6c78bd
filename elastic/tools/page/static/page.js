"use strict";
// The live page: what the server streams is shown; what the buttons ask goes the way of the commands.

const $ = (id) => document.getElementById(id);
const inlined = document.getElementById("data"); // of a report that is one file
const LIVE = ["running", "parked"];
let token = "", chosen = "", stream = null, newest = null, drawn = "", logs = null;

// ---- talking to the server -------------------------------------------------------------------------------------

const headers = (more) => ({ Authorization: `Bearer ${token}`, ...more });

async function* lines(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    for (let at; (at = text.indexOf("\n")) >= 0; text = text.slice(at + 1)) yield text.slice(0, at);
  }
}

async function sentence(response) {
  try { return (await response.json()).error; } catch { return `the server answered ${response.status}`; }
}

async function follow_run(name) {
  if (stream) stream.abort();
  const mine = stream = new AbortController();
  while (!mine.signal.aborted) {
    try {
      const response = await fetch(`api/stream?run=${encodeURIComponent(name)}`, { headers: headers(), signal: mine.signal });
      if (response.status === 401) return refuse();
      if (!response.ok) throw new Error(await sentence(response));
      said("live");
      let kind = "";
      for await (const line of lines(response)) {
        if (line.startsWith("event:")) kind = line.slice(6).trim();
        else if (line.startsWith("data:")) receive(kind, JSON.parse(line.slice(5)));
      }
      throw new Error("the page's server ended");
    } catch (error) {
      if (mine.signal.aborted) return;
      said("lost", error.message === "Failed to fetch" || error.message === "network error" ? "the page's server does not answer" : error.message);
    }
    await new Promise((go) => setTimeout(go, 2000));
  }
}

function said(state, why) {
  $("link").className = `link ${state}`;
  $("link").textContent = state === "live" ? "live" : `not live: ${why}`;
}

function refuse() {
  said("lost", "no token");
  $("run").replaceChildren(element("p", { class: "note bad" }, "This page opens with the whole link that elastic page printed: its token is missing or is that of an earlier page."));
}

function receive(kind, data) {
  if (kind === "runs") showRuns(data);
  if (kind === "run") { newest = data; showRun(data); }
  if (kind === "problem") $("run").replaceChildren(element("p", { class: "note bad" }, data.error)), drawn = "";
}

async function act(verb, body) {
  const words = element("div", { class: "toast" }, `${verb}: asked…`);
  $("toasts").append(words);
  const end = (text, state) => {
    words.textContent = text;
    words.classList.add(state);
    setTimeout(() => words.remove(), state === "bad" ? 20000 : 8000);
  };
  try {
    const response = await fetch(`api/${verb}`, { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify({ run: chosen, ...body }) });
    if (!response.ok) return end(await sentence(response), "bad");
    for await (const line of lines(response)) {
      const told = JSON.parse(line);
      if (told.say) words.textContent = `${verb}: ${told.say}`;
      if (told.error) end(told.error, "bad");
      if (told.done) end(told.done, "good");
    }
  } catch (error) { end(`${verb}: ${error.message}`, "bad"); }
}

function ask({ title, text, yes, bad, field, value }, then) {
  const dialog = $("ask"), input = dialog.querySelector("input");
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-yes").textContent = yes;
  $("ask-yes").className = bad ? "main bad" : "main";
  $("ask-field").hidden = !field;
  input.required = input.disabled = !field;
  input.disabled = !field;
  if (field) { dialog.querySelector("label span").textContent = field; input.value = value; }
  // Not when it has closed: that is told later, and a dialog that was opened again meanwhile would hear it too.
  dialog.querySelector("form").onsubmit = (event) => { if (event.submitter && event.submitter.value === "yes") then(Number(input.value)); };
  dialog.showModal();
  (field ? input : dialog.querySelector("button[value=no]")).focus();
}

// ---- the list of runs ------------------------------------------------------------------------------------------

function showRuns({ place, runs, alone }) {
  $("place").textContent = place;
  document.querySelector(".frame").classList.toggle("alone", alone);
  const at = document.activeElement && document.activeElement.dataset.run;
  $("runs").replaceChildren(element("h2", {}, `${runs.length} ${runs.length === 1 ? "run" : "runs"}`), ...runs.map((run) =>
    element("a", { href: `#/${encodeURIComponent(run.name)}`, "data-run": run.name, class: `is-${run.status}`, "aria-current": run.name === chosen ? "page" : null, title: run.problem || run.name },
      element("i", { class: "dot" }), element("span", { class: "name" }, run.name), element("span", { class: "state" }, run.status),
      run.total_steps ? element("div", { class: "meter" }, element("i", { style: { width: `${100 * Math.min(1, run.step / run.total_steps)}%` } })) : null)));
  if (at) { const link = $("runs").querySelector(`[data-run="${CSS.escape(at)}"]`); if (link) link.focus({ preventScroll: true }); }
  if (!chosen && runs.length) choose((runs.find((r) => LIVE.includes(r.status)) || runs[0]).name);
  if (!runs.length) $("run").replaceChildren(element("p", { class: "empty" }, `There is no run in ${place} yet.`));
}

function choose(name) {
  chosen = name;
  newest = logs = null; drawn = "";
  history.replaceState(null, "", `#/${encodeURIComponent(name)}`);
  for (const link of document.querySelectorAll("[data-run]")) {
    if (link.dataset.run === name) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  follow_run(name);
}

// ---- one run ---------------------------------------------------------------------------------------------------

const card = (title, aside, ...body) => element("section", { class: "card" }, element("header", {}, element("h2", {}, title), aside ? element("span", { class: "sub" }, aside) : null), ...body);
const tile = (name, value, small) => element("div", { class: "tile" }, element("span", {}, name), element("strong", {}, value), element("small", {}, small || ""));
const bytesText = (n) => { for (const unit of ["B", "KiB", "MiB", "GiB"]) { if (n < 1024) return `${unit === "B" ? n : n.toFixed(1)} ${unit}`; n /= 1024; } return `${n.toFixed(1)} TiB`; };
const ageText = (s) => s < 60 ? `${Math.round(s)} s ago` : `${secondsText(s)} ago`;
const money = (v) => v === null || v === undefined ? "–" : v >= 100 ? v.toFixed(0) : v >= 0.1 ? v.toFixed(2) : v.toPrecision(2);

function table(heads, rows) {
  return element("div", { class: "scroll", tabindex: rows.length > 8 ? 0 : null }, element("table", {},
    element("thead", {}, element("tr", {}, heads.map(([name, kind]) => element("th", { class: kind, scope: "col" }, name)))),
    element("tbody", {}, rows.map((row) => element("tr", {}, row.map((cell, i) => element("td", { class: heads[i][1] }, cell)))))));
}

function showRun(run) {
  if (run.name_in_list && run.name_in_list !== chosen) return; // of the run that was shown before
  const main = $("run"), course = run.history;
  document.title = `${run.name} · ${run.status} · Elastic`;
  const focused = document.activeElement && document.activeElement.dataset.key;
  const scrolled = Object.fromEntries([...main.querySelectorAll("[data-scroll]")].map((e) => [e.dataset.scroll, e.scrollTop]));
  const state = JSON.stringify([course.steps.at(-1), course.events.length, course.elapsed_s, course.curves.loss.mean.length]);
  const kept = state === drawn ? main.querySelector("#charts") : null;
  drawn = state;
  main.replaceChildren(head(run), ...notes(run), progress(run), tiles(run), kept || charts(run), lower(run));
  for (const part of main.querySelectorAll("[data-scroll]")) part.scrollTop = scrolled[part.dataset.scroll] || 0;
  if (focused) { const again = main.querySelector(`[data-key="${CSS.escape(focused)}"]`); if (again) again.focus({ preventScroll: true }); }
  if (!kept) for (const make of main.querySelectorAll("[data-chart]")) {
    if (make.dataset.chart === "course") courseChart(make, run);
    if (make.dataset.chart === "split") splitChart(make, course);
  }
}

function head(run) {
  const about = [run.job, run.strategy, run.exactness, run.git_commit ? `commit ${String(run.git_commit).slice(0, 10)}` : "", run.owner].filter(Boolean).join(" · ");
  return element("div", { class: "head" },
    element("div", { class: "what" },
      element("div", { class: "title" }, element("h1", {}, run.name), element("span", { class: `pill ${run.status}` }, run.status)),
      element("p", { class: "sub" }, about)),
    LIVE.includes(run.status) && !inlined ? actions(run) : null);
}

function actions(run) {
  const button = (name, kind, ask_what, then) => element("button", { class: kind, "data-key": name, onclick: () => ask(ask_what(), then) }, name);
  return element("div", { class: "actions" },
    button("Checkpoint", "", () => ({ title: `Save ${run.name}?`, text: "The run saves at its next step boundary. Training goes on.", yes: "Save" }), () => act("checkpoint", {})),
    button("Scale", "", () => ({ title: `Scale ${run.name}`, text: "Workers join or hand over between two steps. No step is lost.", yes: "Scale", field: "Most workers", value: newest.max_workers || 1 }), (n) => act("scale", { max_workers: n })),
    button("Stop", "bad", () => ({ title: `Stop ${run.name}?`, text: "The run saves at its next step boundary and ends. The same command goes on from there.", yes: "Stop the run", bad: true }), () => act("stop", {})));
}

function notes(run) {
  const found = [];
  if (run.message && run.status !== "finished") found.push(element("p", { class: `note ${["failed", "lost"].includes(run.status) ? "bad" : ""}` }, run.message));
  if (run.status === "lost") found.push(element("p", { class: "note bad" }, `Nothing was heard of the run for ${secondsText(run.age_s)}: its command was killed, or its machine is gone. The same command goes on from the newest checkpoint.`));
  if (run.not_asked) found.push(element("p", { class: "note" }, `From its folder alone: ${run.not_asked}`));
  return found;
}

function progress(run) {
  const share = run.total_steps ? Math.min(1, run.step / run.total_steps) : 0;
  return element("div", { class: "progress" },
    element("div", { class: "words" },
      element("span", {}, "step ", element("b", {}, run.step.toLocaleString("en")), run.total_steps ? ` of ${run.total_steps.toLocaleString("en")}` : ""),
      element("span", {}, run.eta_s ? `${secondsText(run.eta_s)} to go` : `driven for ${secondsText(run.history.elapsed_s)}`)),
    element("div", { class: "bar", role: "progressbar", "aria-label": "steps", "aria-valuemin": 0, "aria-valuemax": run.total_steps || 0, "aria-valuenow": run.step }, element("i", { style: { width: `${100 * share}%` } })));
}

function tiles(run) {
  const course = run.history, last = (name) => [...(course.curves[name] || { mean: [] }).mean].reverse().find((v) => v !== null);
  const evaluated = Object.entries(course.evaluations)[0], inside = run.workers.filter((w) => w.rank !== null).length;
  const live = LIVE.includes(run.status), sizes = course.worlds.map((w) => w[1]).filter(Boolean);
  const stalled = course.stalls.reduce((a, s) => a + s.seconds, 0), saved = run.checkpoints[0];
  const found = [
    tile("loss", numberText(last("loss")), evaluated ? `${evaluated[0]} ${numberText(evaluated[1].at(-1)[2])}` : ""),
    tile("workers", live ? String(inside) : sizes.length ? String(sizes.at(-1)) : "–", live ? `of at most ${run.max_workers ?? "?"}` : sizes.length ? `${course.worlds.filter((w) => w[1]).length} worlds` : ""),
    tile(`${course.amount}/s`, course.amount_rate ? Math.round(course.amount_rate).toLocaleString("en") : "–", course.rate ? `${numberText(course.rate)} steps/s` : ""),
    tile("stalls", secondsText(stalled) || "0 s", `${course.stalls.length} in all, ${course.redone} steps redone`),
    tile("checkpoint", saved ? `step ${saved.step.toLocaleString("en")}` : "none", saved ? `${bytesText(saved.bytes)}, ${ageText(saved.age_s)}` : ""),
  ];
  const account = run.account;
  if (account && account.goodput !== null) found.push(tile("productive", `${(100 * account.goodput).toFixed(1)} %`, account.cost !== null ? `cost ${money(account.cost)}` : "of all worker time"));
  return element("div", { class: "card tiles" }, found);
}

function charts(run) {
  const course = run.history, whole = PARTS.reduce((a, p) => a + course.totals[p], 0);
  const parts = PARTS.filter((p) => course.totals[p] > 0);
  return element("div", { class: "stack", id: "charts" },
    card("Course", `over ${secondsText(course.elapsed_s)}`, element("div", { class: "chart", "data-chart": "course", "data-key": "course" }),
      element("div", { class: "legend" },
        element("span", {}, element("i", { style: { background: "var(--loss)" } }), "loss"),
        Object.keys(course.evaluations).includes("eval/loss") ? element("span", {}, element("i", { style: { border: "1.5px solid var(--ink)", borderRadius: "50%" } }), "eval/loss") : null,
        element("span", {}, element("i", { style: { background: "var(--world)" } }), "workers"),
        element("span", {}, element("i", { style: { background: "var(--save)", clipPath: "polygon(50% 0, 100% 100%, 0 100%)" } }), "checkpoint"))),
    whole > 0 ? card("Where steps took their time", `${numberText(1e3 * course.totals.step / Math.max(1, run.step))} ms a step`,
      element("div", { class: "chart", "data-chart": "split", "data-key": "split" }),
      element("div", { class: "legend" }, parts.map((p) => element("span", {}, element("i", { style: { background: `var(--${p})` } }), `${p} `, element("b", {}, `${(100 * course.totals[p] / whole).toFixed(whole && course.totals[p] / whole < 0.1 ? 1 : 0)} %`))))) : null);
}

function lower(run) {
  return element("div", { class: "grid" },
    element("div", { class: "stack" }, members(run), accountCard(run), healthCard(run)),
    element("div", { class: "stack" }, events(run), logsCard(run), stallsCard(run), checkpoints(run), result(run)));
}

const memoryText = (w) => [w.memory_bytes ? bytesText(w.memory_bytes) : "", typeof w.device_memory === "number" ? `${Math.round(100 * w.device_memory)} % of the device` : ""].filter(Boolean).join(", ");

function members(run) {
  if (!run.workers.length) return null;
  const live = LIVE.includes(run.status) && run.asked && !inlined;
  const heads = [["rank", "num"], ["worker", ""], ["node", ""], ["phase", ""]];
  const memory = run.workers.some((w) => w.memory_bytes);
  if (memory) heads.push(["memory", "num"]);
  if (live) heads.push(["", "num"]);
  return card("Members", run.world ? `world ${run.world.generation}` : "", table(heads, run.workers.map((w) => [
    w.rank === null || w.rank === undefined ? "–" : String(w.rank),
    element("span", { title: `process ${w.pid}` }, element("code", {}, String(w.id).slice(0, 14))),
    element("span", { title: w.node }, String(w.host || w.node).slice(0, 18)),
    w.phase && w.state === "in the world" ? w.phase : [w.state, w.phase].filter(Boolean).join(", "),
    ...(memory ? [memoryText(w)] : []),
    ...(live ? [element("span", {},
      element("button", { class: "small", "data-key": `drain ${w.id}`, "aria-label": `Drain worker ${w.id}`, onclick: () => ask({ title: `Drain worker ${w.id}?`, text: `It hands over between two steps and ends; another one is asked for in its place.`, yes: "Drain" }, () => act("drain", { worker: w.id })) }, "Drain"))] : []),
  ])));
}

function accountCard(run) {
  const account = run.account;
  if (!account || !account.causes.length) return null;
  const colour = (cause, i) => cause === "productive" ? "var(--good)" : `color-mix(in oklab, var(--${["synchronisation", "data", "checkpoint", "restore", "loss", "other"][i % 6]}) ${i < 6 ? 100 : 60}%, var(--paper))`;
  const parts = account.causes.filter((c) => c.share >= 0.0005);
  const saved = account.on_demand_cost === null ? "" : `, ${money(account.on_demand_cost)} on demand`;
  return card("Account", `${secondsText(account.worker_seconds)} of workers${account.cost !== null ? `, cost ${money(account.cost)}${saved}` : ""}`,
    element("div", { class: "bar-of", "aria-hidden": "true" }, parts.map((c, i) => element("i", { style: { flex: `${c.seconds} 0 0`, background: colour(c.cause, i - 1) }, title: c.cause }))),
    table([["", ""], ["time", "num"], ["share", "num"], ...(account.cost !== null ? [["cost", "num"]] : [])], parts.map((c, i) => [
      element("span", {}, element("i", { class: "verdict", style: { background: colour(c.cause, i - 1), borderRadius: "3px" } }), element("span", { title: c.meaning }, c.cause)),
      secondsText(c.seconds), `${(100 * c.share).toFixed(1)} %`, ...(account.cost !== null ? [money(c.cost)] : [])])));
}

function healthCard(run) {
  if (!run.health || !run.health.length) return null;
  return card("Health", "", table([["", ""], ["value", "num"], ["goal", ""], ["what to try", "wrap"]], run.health.map((h) => [
    element("span", {}, element("i", { class: "verdict", style: { background: tone(h.tone) } }), h.name), h.value, h.goal, h.advice || ""])));
}

function stallsCard(run) {
  const worst = [...run.history.stalls].sort((a, b) => b.seconds - a.seconds).slice(0, 8);
  if (!worst.length) return null;
  return card("Stalls", `${run.history.stalls.length} in all`, table([["step", "num"], ["time", "num"], ["what happened", "wrap"]], worst.map((s) => [s.step.toLocaleString("en"), secondsText(s.seconds), s.why])));
}

function checkpoints(run) {
  if (!run.checkpoints.length) return null;
  return card("Checkpoints", `${run.checkpoints.length} committed`, table([["step", "num"], ["size", "num"], ["saved", ""], ["state", "wrap"]], run.checkpoints.slice(0, 10).map((c) => [
    c.step.toLocaleString("en"), bytesText(c.bytes), ageText(c.age_s), [c.problem || c.state, c.pinned ? "pinned" : ""].filter(Boolean).join(", ")])));
}

function events(run) {
  const list = [...run.history.events].reverse();
  if (!list.length) return null;
  return card("Events", `newest first`, element("div", { class: "tall", "data-scroll": "events", tabindex: 0, "aria-label": "Events", role: "region" }, element("ol", { class: "events" }, list.map((e) =>
    element("li", { title: new Date(1e3 * e.time).toLocaleString() }, element("time", {}, clockText(e.elapsed)), element("i", { class: e.tone }), element("p", {}, e.text))))));
}

function logsCard(run) {
  if (!run.logs.length || inlined) return null;
  const shown = logs && logs.run === chosen ? logs : null;
  const few = run.logs.slice(-40); // the newest workers; the command has all
  return card("Logs", `${run.logs.length} workers`,
    element("div", { class: "actions" }, few.map((worker) => element("button", { class: "small", "data-key": `log ${worker}`, "aria-pressed": String(!!shown && shown.worker === worker), onclick: () => readLog(worker) }, worker.slice(0, 14)))),
    shown ? element("pre", { class: "log", tabindex: 0, "data-scroll": "log", "aria-label": `Log of worker ${shown.worker}` }, shown.text) : null);
}

async function readLog(worker) {
  const run = chosen;
  const response = await fetch(`api/logs?run=${encodeURIComponent(run)}&worker=${encodeURIComponent(worker)}`, { headers: headers() });
  if (run !== chosen) return;
  logs = { run, worker, text: response.ok ? (await response.json()).text || "nothing was printed" : await sentence(response) };
  showRun(newest);
  const pre = document.querySelector("pre.log");
  if (pre) pre.scrollTop = pre.scrollHeight;
}

function result(run) {
  if (!run.result.weights_sha256) return null;
  const figures = Object.entries(run.result.metrics || {}).map(([name, v]) => `${name} ${numberText(v)}`).join(", ");
  return card("Result", `step ${(run.result.steps || 0).toLocaleString("en")}`, figures ? element("p", {}, figures) : null, element("p", { class: "sub" }, "weights sha256 ", element("code", {}, run.result.weights_sha256)));
}

// ---- beginning -------------------------------------------------------------------------------------------------

function begin() {
  if (inlined) {
    document.querySelector(".frame").classList.add("alone");
    const run = JSON.parse(inlined.textContent);
    $("link").textContent = `as of ${new Date(1e3 * run.looked_at).toLocaleString()}`;
    $("place").textContent = run.run;
    showRun(run);
    return;
  }
  const given = /token=([\w-]+)/.exec(location.hash);
  if (given) { sessionStorage.setItem("token", given[1]); history.replaceState(null, "", location.pathname); }
  token = sessionStorage.getItem("token") || "";
  if (!token) return refuse();
  const named = /^#\/(.+)$/.exec(location.hash);
  chosen = named ? decodeURIComponent(named[1]) : "";
  follow_run(chosen);
}

addEventListener("hashchange", () => { const named = /^#\/(.+)$/.exec(location.hash); if (named && decodeURIComponent(named[1]) !== chosen) choose(decodeURIComponent(named[1])); });
begin();
