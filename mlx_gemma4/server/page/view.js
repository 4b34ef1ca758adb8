"use strict";
// Messages as elements. What a model, a title or a file says becomes text, or Markdown's own elements through the sanitizer.
const $ = id => document.getElementById(id);
const BLOCKS = "p, h1, h2, h3, h4, h5, h6, ul, ol, li, blockquote, th, td"; // each finds its own direction
const LONGEST_COLOURED = 30_000; // characters of code
let editing = null; // the message in an editor: {id, text}

function element(tag, attributes = {}, ...kids) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...kids);
  return made;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), use = document.createElementNS(svg.namespaceURI, "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", "#i-" + name);
  svg.append(use);
  return svg;
}

function iconButton(drawn, name, onclick, more = {}) {
  return element("button", { type: "button", class: "icon", "aria-label": name, title: name, onclick, ...more }, icon(drawn));
}
const textButton = (name, onclick) => element("button", { type: "button", class: "small", onclick }, name);

function copyButton(text, name = "Copy") {
  const button = iconButton("copy", name, async () => {
    let said = "Copied";
    try { await navigator.clipboard.writeText(text()); }
    catch { said = "Can't copy here"; }
    button.replaceChildren(icon(said === "Copied" ? "check" : "copy"));
    button.title = said;
    say(said + ".");
    setTimeout(() => { button.replaceChildren(icon("copy")); button.title = name; }, 1500);
  });
  return button;
}

// The element of a block of Markdown's HTML, without anything that no Markdown makes.
function build(html) {
  const allowed = { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "start", "class"], ALLOWED_URI_REGEXP: WEB };
  const made = DOMPurify.sanitize(html, { ...allowed, RETURN_DOM_FRAGMENT: true });
  for (const block of made.querySelectorAll(BLOCKS)) block.dir = "auto";
  for (const link of made.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const task of made.querySelectorAll("span.task")) {
    const checked = task.classList.contains("done");
    task.replaceWith(element("input", { type: "checkbox", disabled: true, checked, "aria-label": checked ? "done" : "to do" }));
  }
  for (const code of made.querySelectorAll("code.math, code.language-math")) formulaIn(code);
  for (const table of made.querySelectorAll("table")) {
    const wide = element("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Table" });
    table.replaceWith(wide);
    wide.append(table);
  }
  for (const pre of made.querySelectorAll("pre")) codeBox(pre);
  return made.firstElementChild || document.createTextNode("");
}

function codeBox(pre) {
  const code = pre.firstElementChild, language = code.className.replace(/^language-/, ""), text = code.textContent.replace(/\n$/, "");
  const head = element("div", { class: "head" }, element("span", {}, language || "text"), copyButton(() => text, "Copy code"));
  const box = element("div", { class: "code", dir: "ltr" }, head);
  pre.replaceWith(box);
  // Long lines scroll, by keyboard too.
  const roles = { tabindex: "0", role: "group", "aria-label": language ? `Code, ${language}` : "Code" };
  for (const [name, value] of Object.entries(roles)) pre.setAttribute(name, value);
  if (hljs.getLanguage(language) && text.length < LONGEST_COLOURED) {
    const coloured = hljs.highlight(text, { language, ignoreIllegals: true }).value;
    code.replaceChildren(DOMPurify.sanitize(coloured, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true }));
  }
  box.append(pre);
}

// Draws a formula. KaTeX sets a few styles as attributes, which the policy blocks; they go the way that it allows.
function formulaIn(code) {
  const fenced = code.parentElement?.tagName === "PRE", display = fenced || code.classList.contains("display");
  const source = code.textContent.replace(/^(\$\$?|\\[([])|(\$\$?|\\[)\]])$/g, "");
  const box = element("span", { class: display ? "formula display" : "formula", dir: "ltr" }), set = Element.prototype.setAttribute;
  if (display) for (const [name, value] of Object.entries({ tabindex: "0", role: "group", "aria-label": "Formula" })) box.setAttribute(name, value);
  Element.prototype.setAttribute = function (name, value) {
    if (name === "style") this.style.cssText = value; else set.call(this, name, value);
  };
  try {
    katex.render(source.trim(), box, { displayMode: display, throwOnError: true, strict: "ignore", maxSize: 20, maxExpand: 500 });
    (fenced ? code.parentElement : code).replaceWith(box);
  } catch { /* not what KaTeX knows: its text stays, as code */ }
  finally { Element.prototype.setAttribute = set; }
}

// Shows a message in its article. Blocks of Markdown that did not change keep their elements, and what is selected in them.
function show(article, message, last) {
  const user = message.role === "user", busy = last && isBusy(message), edited = editing?.id === message.id;
  if (!article.parts) {
    const thinking = element("details", { class: "thinking" }, element("summary"), element("div", { dir: "auto" }));
    article.parts = [thinking, element("div", { class: "text", dir: user ? "auto" : false }), element("div", { class: "below" })];
    article.append(...article.parts.slice(user ? 1 : 0));
    if (message.media) article.prepend(element("div", { class: "media" }, ...message.media.map(viewOf)));
    article.setAttribute("aria-label", user ? "You" : "Reply");
    article.shown = [];
  }
  const [thinking, text, below] = article.parts, [title, thoughts] = thinking.children;
  article.message = message;
  article.className = message.role + (busy ? " busy" : "");
  article.setAttribute("aria-busy", busy);
  thinking.hidden = !message.thinking;
  title.textContent = busy && !message.content ? "Thinking …" : "Thinking";
  if (thoughts.textContent !== (message.thinking || "")) thoughts.textContent = message.thinking || "";
  const blocks = user ? [message.content] : markdown(message.content);
  blocks.forEach((block, i) => {
    if (article.shown[i] === block) return;
    const made = user ? document.createTextNode(block) : build(block);
    if (i < text.childNodes.length) text.childNodes[i].replaceWith(made); else text.append(made);
  });
  while (text.childNodes.length > blocks.length) text.lastChild.remove();
  article.shown = blocks;
  text.hidden = edited || (user && !message.content);
  below.hidden = edited;
  const { content, media, ...rest } = message, family = siblings(message).map(m => m.id);
  const under = JSON.stringify([busy, last, Boolean(running()), Boolean(content), rest, family, model, context]);
  if (article.under !== under) below.replaceChildren(...(busy ? [] : belowOf(message, last)));
  article.under = under;
  if (edited && !article.editor) article.append((article.editor = editorOf(message)));
  if (!edited && article.editor) { article.editor.remove(); article.editor = null; }
}

// What stands below a message: its branches, what can be done with it, what is to be said of it.
function belowOf(message, last) {
  const made = [], said = [], row = element("div", { class: "row" }), family = siblings(message), at = family.indexOf(message);
  const user = message.role === "user";
  if (message.error) said.push(element("span", { class: "error", role: "alert" }, message.error));
  if (message.error && !message.content && !message.full) said.push(textButton("Try again", () => regenerate(message)));
  if (message.note) said.push(element("span", {}, message.note));
  if (message.full) said.push(fullBox(message));
  if (said.length) made.push(element("div", { class: "row said" }, ...said));
  if (family.length > 1) {
    const step = (name, drawn, by) => iconButton(drawn, name, () => goTo(family[at + by].id), { disabled: !family[at + by] });
    row.append(element("span", { class: "branches", role: "group", "aria-label": `Version ${at + 1} of ${family.length}` },
      step("Earlier version", "left", -1), element("span", {}, `${at + 1}/${family.length}`), step("Later version", "right", 1)));
  }
  if (message.content) row.append(copyButton(() => message.content));
  if (message.content || message.media) row.append(iconButton("pencil", "Edit", () => edit(message), { disabled: Boolean(running()) }));
  if (!user) {
    row.append(iconButton("again", "Regenerate", () => regenerate(message), { disabled: Boolean(running()) }));
    if (last && message.content && (message.note || message.error) && !message.full) row.append(textButton("Continue", () => goOn(message)));
    if (message.model && message.model !== model) row.append(element("span", { class: "stats" }, message.model));
    if (message.stats) row.append(element("span", { class: "stats" }, summary(message.stats, context)));
  }
  made.push(row);
  return made;
}

function fullBox(message) {
  return element("div", { class: "full", role: "group", "aria-label": "The context is full" },
    element("p", {}, `The context is full: the model reads ${context ? many(context) + " tokens" : "no more"} at a time.`),
    textButton("Drop the oldest messages", () => dropOldest(message)),
    textButton("New chat with the last turns", () => moveOn(message)));
}

function editorOf(message) {
  const user = message.role === "user";
  const taken = () => { editing.text = area.value; fit(area); };
  const area = element("textarea", { rows: "1", dir: "auto", "aria-label": "Edit the message", oninput: taken });
  area.value = editing.text;
  area.addEventListener("keydown", event => {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey && (user || event.ctrlKey || event.metaKey)) { event.preventDefault(); saveEdit(message); }
  });
  const done = element("button", { class: "small main" }, user ? "Send again" : "Save as a version");
  const form = element("form", { class: "editor", onsubmit: event => { event.preventDefault(); saveEdit(message); } }, area,
    element("div", { class: "row" }, textButton("Cancel", stopEditing), done));
  requestAnimationFrame(() => { fit(area); area.focus(); });
  return form;
}

// The line above which nothing is sent any more.
function divider() {
  const words = element("span", {}, "What stands above is not sent to the model any more.");
  return element("div", { class: "divider", role: "note" }, words, textButton("Send it again", sendAll));
}

function fit(area) { area.style.height = "auto"; area.style.height = area.scrollHeight + 2 + "px"; }

function say(text, name, onclick) {
  $("status").replaceChildren(text, ...(name ? [textButton(name, onclick)] : []));
}

// How far reading has come, from the server's comment.
function sayRead(comment) {
  const [, done, all] = /^read (\d+) of (\d+)/.exec(comment) || [];
  if (!all) return say(comment[0].toUpperCase() + comment.slice(1) + " …");
  const bar = element("progress", { max: all, value: done, "aria-label": "Reading" });
  $("status").replaceChildren(`Reading: ${many(Number(done))} of ${many(Number(all))} tokens `, bar);
}

const scroller = $("scroll");
const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
const toEnd = () => { scroller.scrollTop = scroller.scrollHeight; };

// Shows the current chat's messages, each in its article.
function showAll() {
  const shown = path(), log = $("log"), at = shown.findIndex(m => m.id === chat.from);
  $("empty").hidden = shown.length > 0;
  document.title = chat.stored ? `${chat.title} · ${model}` : model;
  const articles = new Map([...log.querySelectorAll("article")].map(article => [article.message.id, article]));
  const wanted = shown.map(message => articles.get(message.id) || element("article"));
  if (at > 0) wanted.splice(at, 0, log.querySelector(".divider") || divider());
  wanted.forEach((node, i) => { if (log.children[i] !== node) log.insertBefore(node, log.children[i] || null); });
  while (log.children.length > wanted.length) log.lastElementChild.remove();
  wanted.filter(node => node.tagName === "ARTICLE").forEach((article, i) => {
    show(article, shown[i], i === shown.length - 1);
    article.classList.toggle("dropped", i < at);
  });
  const stop = Boolean(running());
  $("send").classList.toggle("stop", stop);
  $("send").title = $("send").querySelector(".sr").textContent = stop ? "Stop" : "Send";
}
