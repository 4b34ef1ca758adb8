"use strict";
const $ = id => document.getElementById(id);
const [input, log, panel, status, scroller] = ["input", "log", "panel", "status", "scroll"].map($);
const SAVED = "mlx-gemma4", KEY = "mlx-gemma4-key"; // the key stays with the tab: sessionStorage
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
let chat = { messages: [], settings: {} }; // a message: {role, content, thinking?, note?, error?, stats?}
let running = null, removed = null, context = 0, model = "default";

function element(tag, attributes = {}, ...kids) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") made.addEventListener("click", value);
    else made.setAttribute(name, value);
  }
  made.append(...kids);
  return made;
}

// The element of a block of Markdown's HTML, without anything that no Markdown makes.
function build(html) {
  const made = DOMPurify.sanitize(html, { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "start", "class"], ALLOWED_URI_REGEXP: WEB, RETURN_DOM_FRAGMENT: true });
  for (const link of made.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const table of made.querySelectorAll("table")) {
    const wide = element("div", { class: "wide", tabindex: "0" });
    table.replaceWith(wide);
    wide.append(table);
  }
  for (const pre of made.querySelectorAll("pre")) {
    const code = pre.firstElementChild, box = element("div", { class: "code" });
    pre.replaceWith(box);
    pre.tabIndex = 0; // long lines scroll, by keyboard too
    if (code.className) pre.setAttribute("aria-label", code.className.replace("language-", ""));
    box.append(pre, copyButton(() => code.textContent.replace(/\n$/, "")));
  }
  return made.firstElementChild || document.createTextNode("");
}

function copyButton(text) {
  const button = element("button", { type: "button", class: "small", onclick: async () => {
    try { await navigator.clipboard.writeText(text()); button.textContent = "Copied"; }
    catch { button.textContent = "Can't copy here"; }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  } }, "Copy");
  return button;
}

// Shows a message in its article. Blocks of Markdown that did not change keep their elements, and what is selected in them.
function show(article, message, last) {
  const user = message.role === "user", busy = Boolean(running && last && !user);
  if (!article.parts) {
    const thinking = element("details", { class: "thinking" }, element("summary"), element("div", { dir: "auto" }));
    article.parts = [thinking, element("div", { class: "text", dir: "auto" }), element("div", { class: "below" })];
    article.append(...article.parts.slice(user ? 1 : 0));
    article.setAttribute("aria-label", user ? "You" : "Reply");
    article.shown = [];
  }
  const [thinking, text, below] = article.parts, [title, thoughts] = thinking.children;
  article.className = message.role + (busy ? " busy" : "");
  article.setAttribute("aria-busy", busy);
  thinking.hidden = !message.thinking;
  title.textContent = busy && !message.content ? "Thinking …" : "Thinking";
  if (thoughts.textContent !== (message.thinking || "")) thoughts.textContent = message.thinking;
  const blocks = user ? [message.content] : markdown(message.content);
  blocks.forEach((block, i) => {
    if (article.shown[i] === block) return;
    const made = user ? document.createTextNode(block) : build(block);
    if (i < text.childNodes.length) text.childNodes[i].replaceWith(made); else text.append(made);
  });
  while (text.childNodes.length > blocks.length) text.lastChild.remove();
  article.shown = blocks;
  below.replaceChildren(...(busy ? [] : belowOf(message, last)));
}

function belowOf(message, last) {
  const made = [], button = (name, onclick) => element("button", { type: "button", class: "small", onclick }, name);
  if (message.role === "assistant") {
    if (message.error) made.push(element("span", { class: "error", role: "alert" }, message.error));
    if (message.note) made.push(element("span", {}, message.note));
    if (last) made.push(button("Retry", retry));
    if (message.content) made.push(copyButton(() => message.content));
    if (message.stats) made.push(element("span", { class: "stats" }, summary(message.stats, context)));
  } else if (!running && message === chat.messages.findLast(m => m.role === "user")) made.push(button("Edit", editLast));
  return made;
}

function showAll() {
  $("empty").hidden = chat.messages.length > 0;
  while (log.children.length > chat.messages.length) log.lastElementChild.remove();
  chat.messages.forEach((message, i) => {
    if (i >= log.children.length) log.append(element("article"));
    if (log.children[i].message !== message) log.children[i].replaceWith(Object.assign(element("article"), { message }));
    show(log.children[i], message, i === chat.messages.length - 1);
  });
  $("send").textContent = running ? "Stop" : "Send";
}

function save() {
  try { localStorage.setItem(SAVED, JSON.stringify(chat)); }
  catch { say("This browser keeps no more: the conversation won't outlive this tab."); }
}

function say(text, name, onclick) {
  status.replaceChildren(text, ...(name ? [element("button", { type: "button", class: "small", onclick }, name)] : []));
}

const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
const toEnd = () => { scroller.scrollTop = scroller.scrollHeight; };

function request() {
  const { system, think, ...numbers } = chat.settings;
  // A reply that failed before it said anything is no part of the conversation.
  const past = chat.messages.filter(m => m.role === "user" || m.content).map(({ role, content }) => ({ role, content }));
  const messages = system ? [{ role: "system", content: system }, ...past] : past;
  return { model, messages, stream: true, stream_options: { include_usage: true }, chat_template_kwargs: { enable_thinking: Boolean(think) }, ...numbers };
}

function call(path, more) {
  const key = sessionStorage.getItem(KEY);
  return fetch(path, { ...more, headers: { "Content-Type": "application/json", ...(key && { Authorization: "Bearer " + key }) } });
}

async function failure(response) {
  let words = "";
  try { words = (await response.json()).error.message; } catch { /* not JSON: the number must do */ }
  if (response.status === 401) { $("unlock").hidden = false; $("key").focus(); }
  const wait = response.status === 429 && response.headers.get("Retry-After");
  return new Error((words || `The server answered ${response.status}.`) + (wait ? ` Try again in ${wait} s.` : ""));
}

// Asks for the reply to the conversation as it stands.
async function reply() {
  const message = { role: "assistant", content: "" }, stop = (running = new AbortController());
  let first = 0, drawn = 0, savedAt = performance.now();
  const draw = () => { // at most once a frame
    drawn ||= requestAnimationFrame(() => {
      drawn = 0;
      const follow = atEnd();
      if (log.lastElementChild?.message === message) show(log.lastElementChild, message, true);
      if (follow) toEnd();
      if (performance.now() - savedAt > 1000) { savedAt = performance.now(); save(); }
    });
  };
  chat.messages.push(message);
  say("Reading …");
  showAll(); toEnd();
  const parse = sseParser(data => {
    if (data === "[DONE]") return;
    const event = JSON.parse(data), choice = event.choices?.[0], usage = event.usage;
    if (event.error) throw new Error(event.error.message);
    if (choice?.delta.content || choice?.delta.reasoning_content) {
      if (!first) { first = performance.now(); say("Writing …"); }
      message.content += choice.delta.content || "";
      if (choice.delta.reasoning_content) message.thinking = (message.thinking || "") + choice.delta.reasoning_content;
      draw();
    }
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    if (choice?.finish_reason === "length") message.note = "Cut off: no more tokens allowed.";
    if (usage) message.stats = statsOf(usage, first);
  }, comment => { if (!first && comment) say(comment[0].toUpperCase() + comment.slice(1) + " …"); });
  try {
    const response = await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(request()), signal: stop.signal });
    if (!response.ok) throw await failure(response);
    const reader = response.body.getReader(), decoder = new TextDecoder();
    for (let piece; !(piece = await reader.read()).done;) parse(decoder.decode(piece.value, { stream: true }));
    if (!message.finish) throw new Error("The server broke off.");
  } catch (error) {
    if (stop.signal.aborted) message.note = "Stopped.";
    else message.error = error instanceof TypeError ? "The server can't be reached." : error.message;
  }
  delete message.finish;
  if (running === stop) running = null;
  if (!chat.messages.includes(message)) return; // a new chat was started meanwhile
  const follow = atEnd();
  save(); say(""); showAll();
  if (follow) toEnd();
  if (!message.error) input.focus({ preventScroll: true });
}

function statsOf(usage, first) {
  const seconds = (performance.now() - first) / 1000, tokens = usage.completion_tokens;
  return { tokens, rate: first && tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : 0, used: usage.prompt_tokens + tokens, reused: usage.prompt_tokens_details?.cached_tokens || 0 };
}

function send() {
  const text = input.value;
  if (running || !text.trim()) return;
  input.value = ""; removed = null; grow();
  chat.messages.push({ role: "user", content: text });
  save(); reply();
}

function retry() {
  if (running || chat.messages.at(-1)?.role !== "assistant") return;
  chat.messages.pop();
  reply();
}

// Takes the last message and its reply back into the box; Esc puts both back.
function editLast() {
  const at = chat.messages.findLastIndex(m => m.role === "user");
  if (running || at < 0) return;
  removed = chat.messages.splice(at);
  input.value = removed[0].content;
  grow(); showAll(); say("Editing: Esc leaves it as it was."); input.focus();
}

function restore() {
  if (removed) chat.messages.push(...removed);
  removed = null; input.value = "";
  save(); grow(); showAll(); say("");
}

function newChat() {
  const before = removed ? [...chat.messages, ...removed] : chat.messages;
  running?.abort();
  running = removed = null;
  chat.messages = [];
  save(); showAll(); input.value = ""; grow(); input.focus();
  if (before.length) say("A new chat.", "Bring the last one back", () => { running?.abort(); chat.messages = before; save(); showAll(); toEnd(); say(""); });
}

function grow() { input.style.height = "auto"; input.style.height = input.scrollHeight + 2 + "px"; }

function togglePanel(open = panel.hidden) {
  panel.hidden = !open;
  $("settings").setAttribute("aria-expanded", String(open));
  (open ? panel.elements.system : input).focus();
}

async function about() {
  try {
    const response = await call("/v1/models");
    if (!response.ok) throw await failure(response);
    const [first] = (await response.json()).data;
    model = first.id; context = first.context_length || 0;
    $("model").textContent = document.title = model;
    $("unlock").hidden = true;
    showAll();
  } catch (error) { say(error instanceof TypeError ? "The server can't be reached." : error.message); }
}

$("composer").addEventListener("submit", event => { event.preventDefault(); if (running) running.abort(); else send(); });
$("unlock").addEventListener("submit", async event => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = ""; say("");
  await about();
  if ($("unlock").hidden && chat.messages.at(-1)?.error) retry();
});
$("new").addEventListener("click", newChat);
$("settings").addEventListener("click", () => togglePanel());
panel.addEventListener("submit", event => event.preventDefault());
panel.addEventListener("input", () => {
  const { system, think } = panel.elements, settings = { system: system.value, think: think.checked };
  for (const name of NUMBERS) if (Number.isFinite(panel.elements[name].valueAsNumber)) settings[name] = panel.elements[name].valueAsNumber;
  chat.settings = settings; save();
});
input.addEventListener("input", grow);
input.addEventListener("keydown", event => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); send(); }
  if (event.key === "ArrowUp" && !input.value && chat.messages.length) { event.preventDefault(); editLast(); }
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") { if (running) running.abort(); else if (removed) restore(); else if (!panel.hidden) togglePanel(false); }
  if (event.ctrlKey && event.shiftKey && event.code === "KeyO") { event.preventDefault(); newChat(); }
  if (event.altKey && !event.ctrlKey && event.code === "KeyR") { event.preventDefault(); retry(); }
});
addEventListener("pagehide", () => {
  if (removed) { chat.messages.push(...removed); removed = null; }
  if (running) Object.assign(chat.messages.at(-1), { note: "Stopped." });
  save();
});

try {
  const found = JSON.parse(localStorage.getItem(SAVED));
  const sound = m => ["user", "assistant"].includes(m?.role) && typeof m.content === "string";
  if (found?.messages.every(sound)) chat = { messages: found.messages, settings: { ...found.settings } };
} catch { /* not ours, or nothing there: a new chat */ }
for (const [name, value] of Object.entries(chat.settings)) {
  const field = panel.elements[name];
  if (field) field[field.type === "checkbox" ? "checked" : "value"] = value;
}
showAll(); toEnd(); about();
