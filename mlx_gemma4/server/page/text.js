"use strict";
// What needs no browser: server-sent events, Markdown to HTML, chats as files, numbers and errors for people.

// Takes text in any pieces, calls onData with the data of each event and onComment with each comment.
function sseParser(onData, onComment = () => {}) {
  let rest = "", data = [];
  return text => {
    const lines = (rest + text).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") { if (data.length) onData(data.join("\n")); data = []; }
      else if (line[0] === ":") onComment(line.slice(1).trim());
      else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
    }
  };
}

// Markdown as chats have it: HTML in it is text, links lead to the web only, and an image is a link to it, for this page
// loads nothing. Formulas become <code class="math">, their source as it stands: view.js draws them.
const TAGS = "p h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code table thead tbody tr th td hr br strong em s a span".split(" ");
const WEB = /^(https?:\/\/|mailto:)[^\s]+$/i;
const LONGEST_FORMULA = 3000, LONGEST_BLOCK = 100; // characters, lines: what never closes must not cost time
const parser = markdownit({ html: false, linkify: true, breaks: true });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false }); // file.py is no host
parser.validateLink = url => WEB.test(url);
parser.renderer.rules.image = (tokens, i) => {
  const source = tokens[i].attrGet("src"), escape = parser.utils.escapeHtml;
  return source ? `<a href="${escape(source)}">${escape(tokens[i].content || source)}</a>` : escape(tokens[i].content);
};
// [a]() leads nowhere: it is text.
parser.core.ruler.after("inline", "nowhere", ({ tokens }) => {
  for (const { children } of tokens) {
    let open = null; // links hold no links
    for (const token of children || []) {
      if (token.type === "link_open") open = token.attrGet("href") ? null : token;
      if (open && token.type.startsWith("link_")) Object.assign(token, { tag: "span", attrs: null });
      if (token.type === "link_close") open = null;
    }
  }
});

// $a$, $$a$$, \(a\) and \[a\] in a line. As in pandoc, sums of money are none: the text within a $ doesn't begin or end
// with a space, and no letter or digit stands next to it outside.
parser.inline.ruler.before("escape", "math", (state, silent) => {
  const { src, pos, posMax } = state, open = src[pos] === "$" && src[pos + 1] !== "$" ? "$" : src.slice(pos, pos + 2);
  const close = { $: "$", $$: "$$", "\\(": "\\)", "\\[": "\\]" }[open];
  if (!close || (open === "$" && (/\s/.test(src[pos + 1] || " ") || /[\p{L}\p{N}$]/u.test(src[pos - 1] || "")))) return false;
  const start = pos + open.length, near = src.slice(start, Math.min(posMax, start + LONGEST_FORMULA));
  let end = near.indexOf(close);
  const escaped = at => at > 0 && near[at - 1] === "\\" && /(^|[^\\])(\\\\)*\\$/.test(near.slice(Math.max(0, at - 20), at)); // \$
  while (close[0] === "$" && escaped(end)) end = near.indexOf(close, end + 1);
  const text = near.slice(0, end);
  if (end < 0 || !text.trim()) return false;
  const after = src[start + end + 1] || "";
  if (open === "$" && (/[\s`]/.test(near[end - 1]) || text.includes("`") || /[\p{L}\p{N}$]/u.test(after))) return false;
  if (!silent) Object.assign(state.push("math", "code", 0), { content: open + text + close, info: open === "$" || open === "\\(" ? "" : " display" });
  state.pos = start + end + close.length;
  return true;
});

// $$ or \[ that begins a line, to its end some lines further down.
parser.block.ruler.before("fence", "math", (state, from, to, silent) => {
  const line = n => state.src.slice(state.bMarks[n] + state.tShift[n], state.eMarks[n]);
  const close = { $$: "$$", "\\[": "\\]" }[line(from).slice(0, 2)];
  if (!close || state.sCount[from] - state.blkIndent >= 4) return false;
  const lines = [line(from)], ends = text => text.trimEnd().endsWith(close);
  let n = from;
  for (let first = lines[0].slice(2); !ends(first); first = lines.at(-1)) {
    if (++n >= Math.min(to, from + LONGEST_BLOCK) || state.sCount[n] < state.blkIndent) return false;
    lines.push(line(n));
  }
  const text = lines.join("\n").trimEnd();
  if (!text.slice(2, -2).trim() || (n === from && text.slice(2, -2).includes(close))) return false;
  if (silent) return true;
  Object.assign(state.push("math_block", "p", 0), { content: text, map: [from, n + 1] });
  state.line = n + 1;
  return true;
}, { alt: ["paragraph", "reference", "blockquote", "list"] });
const formula = (text, kind) => `<code class="math${kind}">${parser.utils.escapeHtml(text)}</code>`;
parser.renderer.rules.math = (tokens, i) => formula(tokens[i].content, tokens[i].info);
parser.renderer.rules.math_block = (tokens, i) => `<p>${formula(tokens[i].content, " display")}</p>\n`;

// Items of lists that begin with [ ] or [x].
parser.core.ruler.push("tasks", state => {
  state.tokens.forEach((token, i) => {
    const box = token.type === "inline" && state.tokens[i - 2]?.type === "list_item_open" && /^\[([ xX])\]\s/.exec(token.content);
    if (!box || token.children[0]?.type !== "text") return;
    token.children[0].content = token.children[0].content.slice(box[0].length);
    token.children.unshift(Object.assign(new state.Token("task", "span", 0), { info: box[1] === " " ? "task" : "task done" }));
    state.tokens[i - 2].attrJoin("class", "task");
  });
});
parser.renderer.rules.task = (tokens, i) => `<span class="${tokens[i].info}"></span>`;

// The HTML of each block: while a text grows, the blocks before its end stay the same.
function markdown(text) {
  const shared = {}, tokens = parser.parse(text, shared), blocks = [];
  let start = 0;
  tokens.forEach((token, i) => {
    // A column's alignment is a style, which the policy blocks: it becomes a class.
    const side = /^t[hd]_open$/.test(token.type) && /(left|right|center)$/.exec(token.attrGet("style") || "");
    if (side) token.attrs = [["class", side[1]]];
    if (token.level > 0 || token.nesting > 0) return;
    blocks.push(parser.renderer.render(tokens.slice(start, i + 1), parser.options, shared));
    start = i + 1;
  });
  return blocks;
}

const many = number => number.toLocaleString("en");

function summary(stats, context) {
  const parts = [];
  if (stats.tokens) parts.push(`${many(stats.tokens)} tokens`);
  if (stats.rate) parts.push(`${stats.rate.toFixed(1)} tokens/s`);
  if (stats.wait) parts.push(`first after ${stats.wait.toFixed(stats.wait < 10 ? 1 : 0)} s`);
  if (stats.used && context) parts.push(`${many(stats.used)} of ${many(context)} tokens of context`);
  if (stats.reused) parts.push(`${many(stats.reused)} not read again`);
  return parts.join(" · ");
}

const bytes = number => number >= 1e9 ? `${(number / 1e9).toFixed(1)} GB` : `${Math.max(1, Math.round(number / 1e6))} MB`;

// An error for people, from an answer's status, its error (OpenAI's or Ollama's) and whether a key was given.
function inWords(status, error, keyed, wait) {
  const message = typeof error === "string" ? error : error?.message || "";
  const again = wait ? ` Try again in ${wait} s.` : "";
  if (status === 401) return keyed ? "That key is wrong." : "This server asks for its API key.";
  if (status === 403) return "The server refuses requests from this address. Open the page under the address that the server printed.";
  if (status === 413) return "That is more than the server takes at once. Start a new chat, or send less.";
  if (error?.code === "context_length_exceeded") return "The conversation is longer than the model can read.";
  if (error?.code === "shutting_down") return "The server is shutting down." + again;
  if (status >= 500 && (!message || /^unexpected /.test(message))) return "Something went wrong in the server; its log says what." + again;
  const words = message ? message[0].toUpperCase() + message.slice(1) : `The server answered ${status}.`;
  return (/[.!?]$/.test(words) ? words : words + ".") + again;
}

function titleOf(text) {
  const line = text.trim().split(/\s*\n/)[0].replace(/^#+\s*|\*\*|`/g, "");
  return line.length > 60 ? line.slice(0, 60).replace(/\s+\S*$/, "") + " …" : line || "New chat";
}

// Chats as files. JSON has all branches; Markdown has what is shown, and is read back as it was written.
const FORMAT = "mlx-gemma4-chats";
const KEPT = { content: "string", thinking: "string", note: "string", error: "string", model: "string", stats: "object", created: "number" };

function toJson(chats) {
  const plain = ({ chat, messages }) => ({
    title: chat.title, created: chat.created, settings: chat.settings, leaf: chat.leaf, from: chat.from ?? null,
    messages: messages.map(({ chat: _, ...rest }) => rest),
  });
  return JSON.stringify({ format: FORMAT, version: 1, chats: chats.map(plain) }, null, 1);
}

// A line of a message that looks like a head has a backslash before it, which reading takes away.
const HEAD = /^## .* <!-- (user|assistant) -->$/, QUOTED = /^\\+## .* <!-- (user|assistant) -->$/;
function toMarkdown(title, messages) {
  const quoted = text => text.split("\n").map(line => HEAD.test(line) || QUOTED.test(line) ? "\\" + line : line).join("\n");
  const said = m => [...(m.media || []).map(({ kind, name }) => `(${kind}: ${name})`), m.content].join("\n");
  const parts = messages.map(m => `## ${m.role === "user" ? "You" : "Reply"} <!-- ${m.role} -->\n\n${quoted(said(m))}\n`);
  return [`# ${title.replace(/\s+/g, " ")}\n`, ...parts].join("\n");
}

const ROLES = new Map([
  ...["you", "user", "human"].map(name => [name, "user"]), ...["reply", "assistant", "model"].map(name => [name, "assistant"]),
]);
function fromMarkdown(text) {
  const lines = text.replace(/^\ufeff/, "").split(/\r?\n/), messages = [];
  const plain = !lines.some(line => HEAD.test(line)); // not ours: common heads must do
  const title = /^# (.*)$/.exec(lines[0])?.[1];
  for (const line of lines) {
    const role = plain
      ? ROLES.get(/^#{1,3} (\w+):?\s*$/.exec(line)?.[1].toLowerCase())
      : HEAD.exec(line)?.[1];
    if (role) messages.push({ role, lines: [] });
    else messages.at(-1)?.lines.push(plain || !QUOTED.test(line) ? line : line.slice(1));
  }
  if (!messages.length) throw new Error("no chat is in it: heads as '## You' and '## Reply' are missing");
  // After a head and at an end, one empty line each belongs to the file.
  const content = ({ lines: all }) => {
    const inner = all.slice(all[0] === "" ? 1 : 0, all.length > 1 && all.at(-1) === "" ? -1 : undefined).join("\n");
    return plain ? inner.trim() : inner;
  };
  const made = messages.map((m, i) => ({ id: String(i), parent: i ? String(i - 1) : null, role: m.role, content: content(m) }));
  return { title: title || titleOf(made[0].content), settings: {}, from: null, leaf: made.at(-1).id, messages: made };
}

// What a file holds, as chats of {title, created, settings, leaf, from, messages}; Error where it isn't one, in words.
// Nothing is taken over but what is known, with its type; ids are the file's.
function readChats(name, text, settingNames) {
  if (/\.(md|markdown|txt)$/i.test(name)) return [fromMarkdown(text)];
  let file;
  try { file = parsed(text); } catch { throw new Error("it is neither JSON nor Markdown (.md)"); }
  const chats = file?.format === FORMAT ? file.chats : fromLlama(file);
  if (!Array.isArray(chats) || !chats.length) throw new Error("it holds no chats");
  return chats.map(chat => {
    const known = new Map();
    for (const m of Array.isArray(chat?.messages) ? chat.messages : []) {
      if (!["user", "assistant"].includes(m?.role) || typeof m.content !== "string" || typeof m.id !== "string" || known.has(m.id)) continue;
      const made = { id: m.id, parent: m.parent, role: m.role };
      for (const [field, type] of Object.entries(KEPT)) if (m[field] && typeof m[field] === type) made[field] = m[field];
      const media = Array.isArray(m.media) ? m.media.filter(sound) : [];
      known.set(m.id, { content: "", ...made, ...(media.length && { media }) });
    }
    if (!known.size) throw new Error("a chat in it has no messages");
    cutCircles(known);
    const messages = [...known.values()], settings = {};
    for (const name of settingNames) {
      const type = { system: "string", think: "boolean" }[name] || "number", value = chat.settings?.[name];
      if (typeof value === type) settings[name] = value;
    }
    return {
      title: typeof chat.title === "string" && chat.title.trim() ? chat.title.slice(0, 200) : titleOf(messages[0].content),
      created: Number.isFinite(chat.created) ? chat.created : undefined, settings, messages,
      leaf: known.has(chat.leaf) ? chat.leaf : messages.at(-1).id, from: known.has(chat.from) ? chat.from : null,
    };
  });
}

// Media as a message keeps them, of any file.
const DATA = /^data:(image|audio|video)\/[\w.+-]+;base64,[A-Za-z0-9+/]+=*$/;
const sound = m => typeof m?.url === "string" && typeof m.name === "string" && DATA.exec(m.url)?.[1] === m.kind && !m.url.includes("svg");

// Makes trees of messages by id, whatever their parents are.
function cutCircles(known) {
  const safe = new Set();
  for (let message of known.values()) {
    const way = new Set();
    for (let up; !safe.has(message.id); message = up) {
      way.add(message.id);
      up = known.get(message.parent);
      if (!up || way.has(up.id)) { message.parent = null; break; }
    }
    for (const id of way) safe.add(id);
  }
}

// JSON, or the records of llama-server's page, one a line: a session, then its messages.
function parsed(text) {
  try { return JSON.parse(text); } catch { /* not one value */ }
  const found = [];
  for (const record of text.split("\n").filter(line => line.trim()).map(line => JSON.parse(line))) {
    if (record?.type === "session") found.push({ conv: record, messages: [] });
    else if (record?.type === "message") found.at(-1)?.messages.push(record.message);
  }
  return found;
}

// The exports of llama-server's page: [{conv: {name, currNode}, messages: [{id, parent, role, content}]}].
function fromLlama(file) {
  const list = Array.isArray(file) ? file : file?.conv ? [file] : [];
  return list.filter(each => Array.isArray(each?.messages)).map(({ conv, messages }) => ({
    title: conv?.name, created: conv?.lastModified, leaf: conv?.currNode,
    messages: messages.map(m => ({ ...m, thinking: m?.thinking || m?.reasoningContent, created: m?.timestamp })),
  }));
}
