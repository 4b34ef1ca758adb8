"use strict";
// What needs no browser: server-sent events, Markdown to a tree of plain objects, numbers for people.

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

// A tree's nodes are strings or {tag, kids, ...attributes}. Everything a model writes ends up as a text node.
const node = (tag, kids, more) => ({ tag, kids, ...more });
const safeLink = url => /^(https?:\/\/|mailto:)[^\s]+$/i.test(url);
const MARKS = [["***", "em", "strong"], ["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const DEEPEST = 8; // quotes and lists in each other, or marks: deeper ones are shown as text

function inline(text, depth = 0) {
  const out = [], missing = new Set(); // marks that close nowhere behind here: not looked for again
  let plain = "";
  const flush = () => { if (plain) out.push(plain); plain = ""; };
  const put = made => { flush(); out.push(made); };
  for (let i = 0; i < text.length;) {
    const c = text[i];
    if (c === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] || "")) { plain += text[i + 1]; i += 2; continue; }
    if (c === "\n") { put(node("br", [])); i++; continue; }
    if (c === "`") {
      const ticks = /^`+/.exec(text.slice(i, i + 64))[0], end = missing.has(ticks) ? -1 : closingTicks(text, i, ticks);
      if (end > 0) {
        put(node("code", [text.slice(i + ticks.length, end).replace(/^ (.*[^ ].*) $/s, "$1")]));
        i = end + ticks.length;
      } else { missing.add(ticks); plain += ticks; i += ticks.length; }
      continue;
    }
    if ((c === "[" || (c === "!" && text[i + 1] === "[")) && depth < DEEPEST) {
      // An image is shown as a link to it: this page loads nothing.
      const link = /^!?\[([^\[\]\n]{0,500})\]\(<?([^\s<>]{1,2000}?)>?(?:\s+"[^"\n]{0,500}")?\)/.exec(text.slice(i, i + 3100));
      if (link && safeLink(link[2])) {
        put(node("a", inline(link[1] || link[2], DEEPEST), { href: link[2] }));
        i += link[0].length; continue;
      }
    }
    if (c === "h" && !/\w/.test(text[i - 1] || "")) {
      const url = /^https?:\/\/[^\s<>"'`*]{1,2000}[^\s<>"'`*.,;:!?)\]}]/.exec(text.slice(i, i + 2100));
      if (url) { put(node("a", [url[0]], { href: url[0] })); i += url[0].length; continue; }
    }
    const mark = depth < DEEPEST && MARKS.find(([m]) => m[0] === c && text.startsWith(m, i));
    if (mark) {
      const end = missing.has(mark[0]) ? -1 : closing(text, i, mark[0]);
      if (end > 0) {
        const kids = inline(text.slice(i + mark[0].length, end), depth + 1);
        put(mark.slice(1).reduceRight((inner, tag) => [node(tag, inner)], kids)[0]);
        i = end + mark[0].length; continue;
      }
      if (end < 0) missing.add(mark[0]);
      plain += mark[0]; i += mark[0].length; continue;
    }
    plain += c; i++;
  }
  flush();
  return out;
}

function closingTicks(text, at, ticks) {
  for (let i = at + ticks.length; (i = text.indexOf("`", i)) >= 0;) {
    let end = i;
    while (text[end] === "`") end++;
    if (end - i === ticks.length) return i;
    i = end;
  }
  return -1;
}

// Where a mark that opens at `at` closes; 0: it opens nothing here; -1: it closes nowhere.
function closing(text, at, mark) {
  const after = text[at + mark.length] || " ";
  if (/\s/.test(after) || (mark[0] === "_" && /\w/.test(text[at - 1] || ""))) return 0;
  for (let i = at + mark.length + 1, run; (i = text.indexOf(mark, i)) >= 0; i += run) {
    for (run = 1; text[i + run] === mark[0];) run++;
    const closes = !/[\s\\]/.test(text[i - 1]) && !(mark[0] === "_" && /\w/.test(text[i + run] || ""));
    if (closes && (mark.length > 1 || run % 2)) return i + run - mark.length; // an even run is another mark's
  }
  return -1;
}

const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*?)( #+)? *$/;
const starts = line => FENCE.test(line) || RULE.test(line) || HEADING.test(line) || ITEM.test(line) || /^ {0,3}>/.test(line);
const cells = row => row.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map(c => c.trim().replaceAll("\\|", "|"));

// Markdown as chats need it, to a list of blocks. A block that isn't closed yet is taken as closed here.
function markdown(text, depth = 0) {
  const lines = Array.isArray(text) ? text : text.replace(/\r\n?/g, "\n").replaceAll("\t", "    ").split("\n");
  const blocks = [];
  for (let i = 0; i < lines.length;) {
    const line = lines[i];
    let found;
    if (!line.trim()) { i++; continue; }
    if ((found = FENCE.exec(line))) {
      const closes = new RegExp("^ {0,3}" + found[1][0] + "{" + found[1].length + ",} *$"), indent = line.search(/\S/);
      const body = [];
      for (i++; i < lines.length && !closes.test(lines[i]); i++) body.push(lines[i].replace(new RegExp("^ {0," + indent + "}"), ""));
      i++;
      blocks.push(node("pre", [body.join("\n")], { lang: found[2].trim() }));
    } else if ((found = HEADING.exec(line))) {
      blocks.push(node("h" + found[1].length, inline(found[2]))); i++;
    } else if (RULE.test(line)) {
      blocks.push(node("hr", [])); i++;
    } else if (/^ {0,3}>/.test(line) && depth < DEEPEST) {
      const body = [];
      for (; i < lines.length && /^ {0,3}>/.test(lines[i]); i++) body.push(lines[i].replace(/^ {0,3}> ?/, ""));
      blocks.push(node("blockquote", markdown(body, depth + 1)));
    } else if (ITEM.test(line) && depth < DEEPEST) {
      i = list(lines, i, blocks, depth);
    } else if (line.includes("|") && /^ *\|?( *:?-+:? *\|)+( *:?-+:? *)?$/.test(lines[i + 1] || "")) {
      const row = (tag, source) => node("tr", cells(source).map(c => node(tag, inline(c))));
      const rows = [row("th", line)];
      for (i += 2; i < lines.length && lines[i].includes("|") && !starts(lines[i]); i++) rows.push(row("td", lines[i]));
      blocks.push(node("table", rows));
    } else {
      const body = [line.trim()];
      for (i++; i < lines.length && lines[i].trim() && !starts(lines[i]); i++) body.push(lines[i].trim());
      blocks.push(node("p", inline(body.join("\n"))));
    }
  }
  return blocks;
}

// The list that begins at line i; returns the line after it.
function list(lines, i, blocks, depth) {
  const [, lead, bullet] = ITEM.exec(lines[i]), ordered = /\d/.test(bullet), items = [];
  const same = line => { const m = ITEM.exec(line); return m && m[1].length <= lead.length && /\d/.test(m[2]) === ordered ? m : null; };
  for (let m; i < lines.length && !RULE.test(lines[i]) && (m = same(lines[i]));) {
    const body = [lines[i].slice(m[0].length)], inner = m[1].length + 2;
    for (i++; i < lines.length; i++) {
      const line = lines[i], blank = !line.trim(), indent = line.search(/\S/);
      if (blank ? (lines[i + 1] || "").search(/\S/) < inner && !same(lines[i + 1] || "") : indent < inner && (starts(line) || !lines[i - 1].trim())) break;
      body.push(blank ? "" : line.slice(Math.min(indent, Math.max(inner, m[0].length))));
    }
    const kids = markdown(body, depth + 1);
    items.push(node("li", kids.length === 1 && kids[0].tag === "p" ? kids[0].kids : kids));
  }
  blocks.push(ordered ? node("ol", items, { start: parseInt(bullet, 10) }) : node("ul", items));
  return i;
}

function summary(stats, context) {
  const parts = [];
  if (stats.tokens) parts.push(`${stats.tokens} tokens`);
  if (stats.rate) parts.push(`${stats.rate.toFixed(1)} tokens/s`);
  if (stats.used && context) parts.push(`${stats.used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens of context`);
  if (stats.reused) parts.push(`${stats.reused} not read again`);
  return parts.join(" · ");
}
