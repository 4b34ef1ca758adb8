"use strict";
// The server's models, through OpenAI's list and Ollama's API: choose, load, download, delete.
let pulling = null; // the AbortController of a download
let drawnModels = ""; // what the list shows

async function asked(path, body, more = {}) {
  const response = await call(path, { ...(body && { method: "POST", body: JSON.stringify(body) }), ...more });
  if (!response.ok) throw await failure(response);
  return response;
}

// Asks the server what it serves, and takes the model that was chosen last, or the first. True if it told.
async function about() {
  try {
    const { data: cards } = await (await asked("/v1/models")).json();
    const card = cards.find(({ id }) => id === kept.get("model")) || cards[0];
    model = card?.id || "default"; context = card?.context_length || 0;
    showTakes(card?.architecture?.input_modalities);
    $("model").textContent = card ? model : "No model";
    $("context").textContent = context ? `${many(context)} tokens` : "";
    showAll();
    if (card) say(""); else say("There is no model yet.", "Download one", openModels);
    return true;
  } catch (error) { say(inPlainWords(error)); }
}

function tell(words) { $("models-said").textContent = words; }

function openModels() {
  tell("");
  $("models").showModal();
  listModels();
}

async function listModels() {
  try {
    const [tags, running] = await Promise.all(["/api/tags", "/api/ps"].map(async path => (await (await asked(path)).json()).models));
    const loaded = new Set(running.map(({ name }) => name)), drawn = JSON.stringify([tags, [...loaded], model]);
    if (drawn === drawnModels) return; // nothing that a hand may be on is replaced
    drawnModels = drawn;
    $("models-list").replaceChildren(...tags.map(tag => modelItem(tag, loaded.has(tag.name))));
  } catch (error) { tell(inPlainWords(error)); }
}

function modelItem({ name, size, details }, loaded) {
  const current = name === model, facts = [details.parameter_size, details.quantization_level, bytes(size), loaded && "loaded"].filter(Boolean);
  const use = textButton(current ? "In use" : "Use", () => choose(name));
  use.setAttribute("aria-pressed", String(current));
  use.setAttribute("aria-label", `Use ${name}`);
  const drop = iconButton("trash", `Delete ${name}`, () => confirmDelete(name, drop));
  return element("li", { class: current ? "current" : "" },
    element("div", {}, element("strong", { dir: "auto" }, name), element("span", { class: "soft" }, facts.join(" · "))), use, drop);
}

// Takes a model for what is sent from now on, and has it loaded.
async function choose(name) {
  kept.set("model", name);
  await about();
  await listModels();
  tell(`Loading ${name} …`);
  try {
    await asked("/api/generate", { model: name, stream: false });
    tell(`${name} is ready.`);
  } catch (error) { tell(inPlainWords(error)); }
  listModels();
}

// The first press asks, the second one deletes.
function confirmDelete(name, button) {
  const sure = element("button", { type: "button", class: "small bad", onclick: () => remove(name) }, "Delete for good");
  sure.addEventListener("blur", () => sure.replaceWith(button));
  button.replaceWith(sure);
  sure.focus();
}

async function remove(name) {
  tell(`Deleting ${name} …`);
  try {
    await asked("/api/delete", { model: name }, { method: "DELETE" });
    tell(`${name} is deleted.`);
  } catch (error) { tell(inPlainWords(error)); }
  await about();
  listModels();
}

function showPull(line) {
  const { status, total, completed } = line, bar = $("pull-bar");
  bar.hidden = !pulling;
  if (total) Object.assign(bar, { max: total, value: completed || 0 }); else bar.removeAttribute("value");
  tell(total ? `Downloading: ${bytes(completed || 0)} of ${bytes(total)}` : `${titleOf(status)} …`);
}

// Downloads a model by its name. What has come stays: a download that was stopped goes on from there.
async function pull(name) {
  if (!name) return;
  pulling = new AbortController();
  $("pull-go").textContent = "Stop";
  showPull({ status: "Asking" });
  let told = "The server broke off: what has come is kept.";
  try {
    const response = await asked("/api/pull", { model: name }, { signal: pulling.signal });
    const reader = response.body.getReader(), decoder = new TextDecoder();
    let rest = "";
    for (let piece; !(piece = await reader.read()).done;) {
      const lines = (rest + decoder.decode(piece.value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines.filter(Boolean).map(text => JSON.parse(text))) {
        if (line.error) throw new Error(inWords(400, line.error));
        if (line.status === "success") told = `${name} is here.`;
        showPull(line);
      }
    }
    $("pull-name").value = "";
  } catch (error) { told = pulling.signal.aborted ? "Stopped: what has come is kept." : inPlainWords(error); }
  pulling = null;
  $("pull-go").textContent = "Download";
  $("pull-bar").hidden = true;
  await about();
  await listModels();
  tell(told);
}
