"use strict";
// What needs no browser: server-sent events, Markdown to HTML, numbers for people.

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
// loads nothing.
const TAGS = "p h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code table thead tbody tr th td hr br strong em s a".split(" ");
const WEB = /^(https?:\/\/|mailto:)[^\s]+$/i;
const parser = markdownit({ html: false, linkify: true, breaks: true });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false }); // file.py is no host
parser.validateLink = url => WEB.test(url);
parser.renderer.rules.image = (tokens, i) => {
  const source = tokens[i].attrGet("src"), escape = parser.utils.escapeHtml;
  return `<a href="${escape(source)}">${escape(tokens[i].content || source)}</a>`;
};

// The HTML of each block: while a text grows, the blocks before its end stay the same.
function markdown(text) {
  const shared = {}, tokens = parser.parse(text, shared), blocks = [];
  let start = 0;
  tokens.forEach((token, i) => {
    if (/^t[hd]_open$/.test(token.type)) token.attrs = null; // a column's alignment is a style, which the policy blocks
    if (token.level > 0 || token.nesting > 0) return;
    blocks.push(parser.renderer.render(tokens.slice(start, i + 1), parser.options, shared));
    start = i + 1;
  });
  return blocks;
}

function summary(stats, context) {
  const parts = [];
  if (stats.tokens) parts.push(`${stats.tokens} tokens`);
  if (stats.rate) parts.push(`${stats.rate.toFixed(1)} tokens/s`);
  if (stats.used && context) parts.push(`${stats.used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens of context`);
  if (stats.reused) parts.push(`${stats.reused} not read again`);
  return parts.join(" · ");
}
