"use strict";
// The current chat: its tree of messages, and what is done with them.
const input = $("input"), panel = $("panel"), KEY = "mlx-gemma4-key"; // the key stays with the tab: sessionStorage
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"], SETTINGS = ["system", "think", ...NUMBERS];
const LIVE = 5000; // ms after which a reply in another tab, of which nothing is heard, is no longer being written
let chat = freshChat(), tree = new Map(), leaf = null; // tree: messages of all branches by id; leaf: the last shown
let context = 0, model = "default";
const runs = new Map(); // chat's id to the reply being written here: {message, stop, gone}
const elsewhere = new Map(); // id of a reply being written in another tab to its timer

function freshChat() {
  return { id: newId(), title: "New chat", stored: false, settings: kept.get("settings") || {}, from: null };
}

const running = () => runs.get(chat.id);
const isBusy = message => running()?.message === message || elsewhere.has(message.id);

function pathTo(id) {
  const found = [];
  for (let message = tree.get(id); message; message = tree.get(message.parent)) found.unshift(message);
  return found;
}
const path = () => pathTo(leaf);
const inOrder = (a, b) => a.created - b.created || (a.id < b.id ? -1 : 1);
const siblings = message => [...tree.values()].filter(m => m.parent === message.parent).sort(inOrder);

// The end of the newest branch from a message on.
function newest(id) {
  for (let next; (next = [...tree.values()].filter(m => m.parent === id).sort(inOrder).at(-1));) id = next.id;
  return id;
}

async function save(fields, messages, live) {
  const { id } = chat;
  Object.assign(chat, fields, { stored: true });
  await written(id, { title: chat.title, settings: chat.settings, ...fields }, messages, live);
}

async function written(id, fields, messages, live) {
  try { await store.write(id, fields, messages, live); }
  catch { say("This browser keeps no more: what is new won't outlive this tab."); }
  showList();
}

function add(role, content, parent = leaf, more = {}) {
  const created = Math.max(Date.now(), ...[...tree.values()].map(m => m.created + 1)); // in order, however fast they come
  const message = { id: newId(), chat: chat.id, parent, role, content, created, ...(role === "assistant" && { model }), ...more };
  tree.set(message.id, message);
  leaf = message.id;
  return message;
}

function request(messages, goesOn) {
  const { system, think, ...numbers } = chat.settings;
  // A reply that failed before it said anything is no part of the conversation.
  const past = messages.filter(m => m.role === "user" || m.content).map(m => ({ role: m.role, content: contentOf(m) }));
  const more = goesOn ? { continue_final_message: true, add_generation_prompt: false } : {};
  const enable_thinking = Boolean(think) && !goesOn; // what is gone on with has been thought about
  return {
    model, messages: system ? [{ role: "system", content: system }, ...past] : past,
    stream: true, stream_options: { include_usage: true }, chat_template_kwargs: { enable_thinking }, ...numbers, ...more,
  };
}

function call(path, more) {
  const key = sessionStorage.getItem(KEY);
  return fetch(path, { ...more, headers: { "Content-Type": "application/json", ...(key && { Authorization: "Bearer " + key }) } });
}

// The Error of an answer that is none, in words. Asks for the key where that is what is missing.
async function failure(response) {
  let error;
  try { error = (await response.json()).error; } catch { /* not JSON: the number must do */ }
  const wait = [429, 503].includes(response.status) && response.headers.get("Retry-After");
  const words = inWords(response.status, error, Boolean(sessionStorage.getItem(KEY)), wait);
  if (response.status === 401) askKey(words);
  return Object.assign(new Error(words), { full: error?.code === "context_length_exceeded" });
}

function inPlainWords(error) {
  if (error instanceof TypeError) return "The server can't be reached.";
  return error instanceof SyntaxError ? "The server sent what can't be read." : error.message;
}

// Asks for a reply to the branch that ends at the leaf, or for more of a reply that was cut.
async function reply(message = add("assistant", ""), goesOn = false) {
  const id = chat.id, stop = new AbortController(), run = { message, stop, gone: false };
  const asked = performance.now(), before = (goesOn && message.stats?.tokens) || 0;
  const sent = pathTo(goesOn ? message.id : message.parent), from = Math.max(0, sent.findIndex(m => m.id === chat.from));
  let first = 0, drawn = 0, savedAt = 0, finish = "", usage = null;
  const here = () => chat.id === id;
  const draw = () => { // at most once a frame
    drawn ||= requestAnimationFrame(() => {
      drawn = 0;
      if (!here()) return;
      const follow = atEnd(), article = $("log").lastElementChild;
      if (article?.message === message) show(article, message, true);
      if (follow) toEnd();
    });
    if (run.gone || performance.now() - savedAt < 1000) return;
    savedAt = performance.now();
    written(id, { leaf: message.id }, [{ ...message, note: "Stopped." }], message.id); // as it is, should this tab end here
  };
  for (const field of ["note", "error", "full", ...(goesOn ? [] : ["thinking", "stats"])]) delete message[field];
  if (!goesOn) message.content = "";
  runs.set(id, run);
  editing = null;
  say("Reading …");
  showAll(); toEnd(); showList();
  const parse = sseParser(data => {
    if (data === "[DONE]") return;
    const event = JSON.parse(data), choice = event.choices?.[0];
    if (event.error) throw new Error(inWords(event.error.code === "shutting_down" ? 503 : 500, event.error));
    if (choice?.delta.content || choice?.delta.reasoning_content) {
      if (!first) { first = performance.now(); if (here()) say("Writing …"); }
      message.content += choice.delta.content || "";
      if (choice.delta.reasoning_content) message.thinking = (message.thinking || "") + choice.delta.reasoning_content;
      draw();
    }
    finish = choice?.finish_reason || finish;
    usage = event.usage || usage;
  }, comment => { if (!first && comment && here()) sayRead(comment); });
  try {
    const body = JSON.stringify(request(sent.slice(from), goesOn));
    const response = await call("/v1/chat/completions", { method: "POST", body, signal: stop.signal });
    if (!response.ok) throw await failure(response);
    const reader = response.body.getReader(), decoder = new TextDecoder();
    for (let piece; !(piece = await reader.read()).done;) parse(decoder.decode(piece.value, { stream: true }));
    if (!finish) throw new Error("The server broke off.");
  } catch (error) {
    if (stop.signal.aborted) message.note = "Stopped.";
    else Object.assign(message, { error: inPlainWords(error), ...(error.full && { full: true }) });
  }
  if (usage) message.stats = statsOf(usage, asked, first, before);
  if (finish === "length") {
    if (context && message.stats?.used >= context) message.full = true;
    else message.note = "Cut off: no more tokens allowed.";
  }
  runs.delete(id);
  if (!run.gone) await written(id, { leaf: message.id }, [message]);
  if (!here()) return;
  const follow = atEnd();
  say(""); showAll();
  if (follow) toEnd();
  const idle = !editing && !document.querySelector("dialog[open]") && document.activeElement === document.body;
  if (idle && !message.error) input.focus({ preventScroll: true });
}

function statsOf(usage, asked, first, before) {
  const seconds = (performance.now() - first) / 1000, tokens = usage.completion_tokens;
  return {
    tokens: before + tokens, rate: first && tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : 0, wait: first ? (first - asked) / 1000 : 0,
    used: usage.prompt_tokens + tokens, reused: usage.prompt_tokens_details?.cached_tokens || 0,
  };
}

async function send() {
  const text = input.value;
  if (running() || !(text.trim() || attached.length)) return;
  input.value = ""; fit(input);
  kept.set(draftName(), null);
  if (!chat.stored) { chat.title = titleOf(text.trim() ? text : attached[0].name); place(chat.id, true); }
  const message = add("user", text, leaf, takeAttached());
  save({ leaf }, [message]);
  reply();
}

function regenerate(message = path().at(-1)) {
  if (running() || message?.role !== "assistant") return;
  if (!message.content && !message.thinking) { // it said nothing: it is asked for again in its place
    leaf = message.id;
    return reply(message);
  }
  leaf = message.parent;
  reply();
}

function goOn(message) { if (!running()) reply(message, true); }

// Shows the branch that a message is on.
function goTo(id) {
  if (running()) return;
  leaf = newest(id);
  save({ leaf });
  showAll();
  [...$("log").children].find(article => article.message?.id === id)?.scrollIntoView({ block: "nearest" });
}

function edit(message) {
  if (running()) return;
  editing = { id: message.id, text: message.content };
  showAll();
  say(message.role === "user" ? "Enter sends it again, Esc leaves it as it was." : "Ctrl+Enter saves, Esc leaves it as it was.");
}

function stopEditing() {
  editing = null;
  say(""); showAll(); input.focus();
}

// The edited message stands beside the old one, which stays as another branch.
function saveEdit(message) {
  const { text } = editing;
  if (!text.trim() && !message.media) return;
  editing = null; say("");
  if (text === message.content && message.role === "assistant") return stopEditing();
  const { id } = chat, made = add(message.role, text, message.parent, message.media && { media: message.media });
  if (chat.from === message.id) chat.from = made.id;
  save({ leaf, from: chat.from }, [made]);
  if (made.role === "user") reply();
  else if (chat.id === id) { showAll(); input.focus(); }
}

// The last turns of a branch, as long as half of what was sent last, from a message of the user's on.
function lastTurns(message) {
  const all = pathTo(message.id), sent = all.slice(Math.max(0, all.findIndex(m => m.id === chat.from)));
  const length = list => list.reduce((sum, m) => sum + m.content.length + 1000 * (m.media?.length || 0), 0); // a picture takes about so much
  const starts = sent.filter((m, i) => m.role === "user" && i > 0);
  const start = starts.find(m => length(sent.slice(sent.indexOf(m))) <= length(sent) / 2) || starts.at(-1);
  return start ? sent.slice(sent.indexOf(start)) : [];
}

const tooLong = () => say("One message alone is too long for the model: edit it.");

function dropOldest(message) {
  const rest = lastTurns(message);
  if (running()) return;
  if (!rest.length) return tooLong();
  chat.from = rest[0].id;
  save({ from: chat.from });
  if (message.content) goOn(message); else reply(message);
}

function sendAll() {
  chat.from = null;
  save({ from: null });
  showAll();
}

function moveOn(message) {
  const rest = lastTurns(message), { title, settings } = chat;
  if (running()) return;
  if (!rest.length) return tooLong();
  newChat();
  Object.assign(chat, { title: `${title} (2)`.replace(/\((\d+)\) \(2\)$/, (_, n) => `(${Number(n) + 1})`), settings });
  const copies = rest.filter(m => m.role === "user" || m.content).map(m => {
    const copy = add(m.role, m.content, leaf, m.media && { media: m.media });
    return m.thinking ? Object.assign(copy, { thinking: m.thinking }) : copy;
  });
  place(chat.id, true);
  showSettings();
  save({ leaf }, copies);
  if (copies.at(-1).role === "assistant") goOn(copies.at(-1)); else reply();
}

// Ends the reply to a chat that is being deleted, which it must not bring back.
function abandon(id) {
  const run = runs.get(id);
  if (run) { run.gone = true; run.stop.abort(); }
}

// Another tab has written. What is being written here stays as it is here.
async function heard(event) {
  showList();
  if (event.gone) abandon(event.chat);
  if (event.live) {
    clearTimeout(elsewhere.get(event.live));
    elsewhere.set(event.live, setTimeout(() => { elsewhere.delete(event.live); showAll(); }, LIVE));
  } else if (event.chat === chat.id) {
    for (const id of elsewhere.keys()) if (tree.has(id)) { clearTimeout(elsewhere.get(id)); elsewhere.delete(id); }
  }
  if (event.chat !== chat.id) return;
  if (event.gone) {
    newChat();
    return say("That chat was deleted in another tab.");
  }
  const found = await store.read(event.chat).catch(() => null);
  if (!found || event.chat !== chat.id) return;
  const follow = atEnd(), grown = !running() && newest(leaf) === leaf;
  take(found);
  if (grown && leaf) leaf = newest(leaf);
  showAll();
  if (follow) toEnd();
}

function take({ chat: record, messages }) {
  chat = { ...record, stored: true };
  const own = running()?.message; // it is newer than what is stored
  if (own) tree.set(own.id, own);
  for (const message of messages) {
    const known = tree.get(message.id); // an object stays the same: articles and buttons have it
    if (!known) tree.set(message.id, message);
    else if (known !== own) {
      for (const field of Object.keys(known)) if (!(field in message)) delete known[field];
      Object.assign(known, message);
    }
  }
}
