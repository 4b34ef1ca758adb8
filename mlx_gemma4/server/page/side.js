"use strict";
// The list of chats beside the current one: search, names, files; and which chat is shown in this tab.
const side = $("side"), wide = matchMedia("(min-width: 52rem)");
const draftName = () => "draft:" + (chat.stored ? chat.id : "new");
let found = null, renaming = null, menuFor = null; // ids that the search found; id that gets a name; record of the open menu
let listed = [], drawnList = ""; // all chats' records, newest first; what of them is shown

// The address names the chat, so that a reload and the way back lead to it.
function place(id, instead = false) {
  if (location.hash === "#" + id) return;
  history[instead ? "replaceState" : "pushState"](null, "", "#" + id);
}

function newChat() {
  if (chat.stored || leaf) place("new");
  chat = freshChat(); tree = new Map(); leaf = null;
  begin();
}

async function openChat(id, instead) {
  const record = await store.read(id).catch(() => null);
  if (!record) return false;
  chat = { ...record.chat }; tree = new Map();
  take(record);
  leaf = running()?.message.id ?? (tree.has(chat.leaf) ? chat.leaf : record.messages.at(-1)?.id ?? null);
  place(id, instead);
  begin();
  return true;
}

// Shows the chat that was just made current.
function begin() {
  editing = null;
  input.value = kept.get(draftName()) || "";
  showSettings(); showAll(); toEnd(); showList(); fit(input); say("");
  if (!wide.matches) showSide(false);
  if (!document.querySelector("dialog[open]")) input.focus();
}

function showSide(open) {
  side.hidden = !open;
  $("shade").hidden = !open || wide.matches;
  $("sides").setAttribute("aria-expanded", String(open));
}

const DAY = 86_400_000;
function ageOf(time) {
  const days = Math.floor((new Date().setHours(24, 0, 0, 0) - time) / DAY);
  return days < 1 ? "Today" : days < 2 ? "Yesterday" : days < 8 ? "Last 7 days" : days < 31 ? "Last 30 days" : "Earlier";
}

async function showList() {
  try { listed = await store.list(); }
  catch { listed = []; }
  const shown = listed.filter(({ id }) => !found || found.has(id)), groups = new Map();
  const drawn = JSON.stringify([chat.id, renaming, shown.map(({ id, title, updated }) => [id, title, ageOf(updated), runs.has(id)])]);
  $("none").hidden = shown.length > 0;
  $("none").textContent = found ? "Nothing found." : "No chats yet.";
  if (drawn === drawnList || $("chats").querySelector("input")) return; // as it is, or a name is being typed
  drawnList = drawn;
  for (const record of shown) {
    const age = ageOf(record.updated);
    if (!groups.has(age)) groups.set(age, []);
    groups.get(age).push(record);
  }
  const focused = document.activeElement.closest?.("#chats li")?.dataset.id, which = document.activeElement.className;
  $("chats").replaceChildren(...[...groups].flatMap(([age, records]) => {
    const id = "age-" + age.replace(/\W+/g, "-");
    return [element("h2", { id }, age), element("ul", { "aria-labelledby": id }, ...records.map(itemOf))];
  }));
  if (focused) $("chats").querySelector(`li[data-id="${focused}"] button.${which.split(" ")[0]}`)?.focus();
}

function itemOf(record) {
  const current = record.id === chat.id, item = element("li", { "data-id": record.id, class: current ? "current" : "" });
  if (renaming === record.id) item.append(nameEditor(record));
  else {
    const opens = element("button", { type: "button", class: "name", dir: "auto", title: record.title, "aria-current": current && "page", onclick: () => openChat(record.id) }, record.title);
    const more = iconButton("more", `More for ${record.title}`, () => openMenu(record, more), { "aria-haspopup": "menu", class: "icon more" });
    if (runs.has(record.id)) opens.prepend(element("span", { class: "dot", role: "img", "aria-label": "A reply is being written:" }));
    item.append(opens, more);
  }
  return item;
}

function nameEditor(record) {
  const field = element("input", { "aria-label": "Name of the chat", dir: "auto", maxlength: "200" });
  field.value = record.title;
  const end = async keep => {
    if (renaming !== record.id) return;
    renaming = null;
    const title = field.value.trim();
    field.remove();
    if (keep && title && title !== record.title) {
      if (record.id === chat.id) chat.title = title;
      await written(record.id, { title });
    }
    await showList();
    showAll();
  };
  field.addEventListener("keydown", event => {
    if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
    event.preventDefault(); event.stopPropagation();
    end(event.key === "Enter");
  });
  field.addEventListener("blur", () => end(true));
  requestAnimationFrame(() => { field.focus(); field.select(); });
  return field;
}

// The menu of a chat: a popover, which closes by itself; arrows move in it.
function openMenu(record, button) {
  const menu = $("menu"), box = button.getBoundingClientRect();
  menuFor = { record, button };
  menu.showPopover();
  menu.style.left = Math.max(4, Math.min(box.right - menu.offsetWidth, innerWidth - menu.offsetWidth - 4)) + "px";
  menu.style.top = Math.min(box.bottom + 2, innerHeight - menu.offsetHeight - 4) + "px";
  menu.firstElementChild.focus();
}

const MENU = {
  rename: ({ id }) => { renaming = id; showList(); },
  json: async ({ id, title }) => saveFile(title + ".json", "application/json", toJson([await store.read(id)])),
  markdown: async ({ id, title }) => {
    const { chat: record, messages } = await store.read(id), all = new Map(messages.map(m => [m.id, m])), shown = [];
    for (let m = all.get(record.leaf); m; m = all.get(m.parent)) shown.unshift(m);
    saveFile(title + ".md", "text/markdown", toMarkdown(title, shown));
  },
  delete: async ({ id, title }) => {
    const record = await store.read(id);
    if (!record) return;
    abandon(id);
    await store.remove(id);
    if (id === chat.id) newChat();
    showList();
    say(`Deleted: ${title}`, "Undo", async () => {
      await written(id, record.chat, record.messages);
      openChat(id);
    });
  },
};

function saveFile(name, type, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name.replace(/[\\/:*?"<>|\p{Cc}]+/gu, "-") });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function exportAll() {
  const all = await Promise.all(listed.map(({ id }) => store.read(id)));
  saveFile("chats.json", "application/json", toJson(all.filter(Boolean)));
}

// Each chat of a file becomes a new one: ids are made anew, so that nothing that is here changes.
async function importFile(file) {
  try {
    const chats = readChats(file.name, await file.text(), SETTINGS);
    let first = null;
    for (const { title, created, settings, leaf: last, from, messages } of chats) {
      const id = newId(), ids = new Map(messages.map(m => [m.id, newId()])), now = Date.now();
      const made = messages.map((m, i) => ({ created: now + i, ...m, id: ids.get(m.id), parent: ids.get(m.parent) ?? null }));
      await store.write(id, { title, settings, leaf: ids.get(last), from: ids.get(from) ?? null, ...(created && { created }) }, made);
      first ||= id;
    }
    await openChat(first);
    say(chats.length === 1 ? "Imported." : `Imported ${chats.length} chats.`);
  } catch (error) { say(`${file.name} can't be imported: ${error.message}.`); }
}

async function searchNow() {
  const words = $("search").value.trim();
  const ids = words ? await store.search(words).catch(() => new Set()) : null;
  if ($("search").value.trim() !== words) return; // typed on meanwhile
  found = ids;
  showList();
}

function showSettings() {
  panel.reset();
  for (const [name, value] of Object.entries(chat.settings)) {
    const field = panel.elements[name];
    if (field) field[field.type === "checkbox" ? "checked" : "value"] = value;
  }
  $("think").setAttribute("aria-pressed", String(Boolean(chat.settings.think)));
}

function takeSettings() {
  const { system, think } = panel.elements, settings = { system: system.value, think: think.checked };
  for (const name of NUMBERS) if (Number.isFinite(panel.elements[name].valueAsNumber)) settings[name] = panel.elements[name].valueAsNumber;
  chat.settings = settings;
  kept.set("settings", settings);
  $("think").setAttribute("aria-pressed", String(think.checked));
  if (chat.stored) save({ settings });
}
