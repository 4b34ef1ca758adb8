"use strict";
// What the keyboard and the buttons do, and how the page begins.
function togglePanel(open = panel.hidden) {
  panel.hidden = !open;
  $("settings").setAttribute("aria-expanded", String(open));
  (open ? panel.elements.system : input).focus();
}

function askKey(words) {
  $("asked").textContent = words;
  if (!$("unlock").open) $("unlock").showModal();
  $("key").focus();
}

async function unlock(event) {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  if (!await about()) return;
  $("unlock").close();
  const last = path().at(-1);
  if (last?.error && !last.content) regenerate(last);
}

function onKey(event) {
  if (event.isComposing) return;
  const dialog = document.querySelector("dialog[open]");
  if (event.key === "Escape" && !dialog) {
    if (editing) stopEditing();
    else if (running()) running().stop.abort();
    else if (!panel.hidden) togglePanel(false);
    else if (!side.hidden && !wide.matches) { showSide(false); $("sides").focus(); }
    else if (document.activeElement === $("search")) { $("search").value = ""; searchNow(); input.focus(); }
  }
  const command = event.ctrlKey || event.metaKey;
  const does = command && event.shiftKey && event.code === "KeyO" ? newChat
    : command && !event.shiftKey && event.code === "KeyK" ? () => { showSide(true); $("search").focus(); }
      : event.altKey && !event.ctrlKey && event.code === "KeyR" ? () => regenerate() : null;
  if (does && !dialog) { event.preventDefault(); does(); }
}

function onMenuKey(event) {
  const items = [...$("menu").children], at = items.indexOf(document.activeElement);
  const to = { ArrowDown: (at + 1) % items.length, ArrowUp: (at + items.length - 1) % items.length, Home: 0, End: items.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  items[to].focus();
}

$("composer").addEventListener("submit", event => { event.preventDefault(); if (running()) running().stop.abort(); else send(); });
$("unlock").addEventListener("submit", unlock);
$("new").addEventListener("click", newChat);
$("new2").addEventListener("click", newChat);
$("settings").addEventListener("click", () => togglePanel());
$("sides").addEventListener("click", () => { showSide(side.hidden); if (!side.hidden && !wide.matches) $("search").focus(); });
$("shade").addEventListener("click", () => showSide(false));
$("think").addEventListener("click", () => { panel.elements.think.checked = !panel.elements.think.checked; takeSettings(); input.focus(); });
$("models-open").addEventListener("click", openModels);
$("models-close").addEventListener("click", () => $("models").close());
$("pull").addEventListener("submit", event => { event.preventDefault(); if (pulling) pulling.abort(); else pull($("pull-name").value.trim()); });
$("known").addEventListener("click", event => { if (event.target.dataset.name) { $("pull-name").value = event.target.dataset.name; $("pull-go").focus(); } });
$("search").addEventListener("input", searchNow);
$("export").addEventListener("click", exportAll);
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  for (const file of [...$("file").files]) await importFile(file);
  $("file").value = "";
});
for (const item of $("menu").children) {
  item.addEventListener("click", () => {
    $("menu").hidePopover();
    Promise.resolve(MENU[item.dataset.does](menuFor.record)).catch(() => say("This browser can't reach its chats."));
  });
}
$("menu").addEventListener("keydown", onMenuKey);
$("menu").addEventListener("toggle", event => { if (event.newState === "closed" && document.activeElement === document.body) menuFor?.button.focus(); });
panel.addEventListener("submit", event => event.preventDefault());
panel.addEventListener("input", takeSettings);
input.addEventListener("input", () => { fit(input); kept.set(draftName(), input.value); });
input.addEventListener("keydown", event => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); send(); }
  const last = event.key === "ArrowUp" && !input.value && path().findLast(m => m.role === "user");
  if (last) { event.preventDefault(); edit(last); }
});
document.addEventListener("keydown", onKey);
addEventListener("popstate", () => { if (location.hash !== "#" + chat.id) atAddress(); });
addEventListener("pagehide", () => {
  for (const [id, { message }] of runs) store.spill(id, { leaf: message.id }, { ...message, note: "Stopped." });
});
wide.addEventListener("change", () => showSide(wide.matches));

async function atAddress() {
  const id = location.hash.slice(1);
  if (id === "new" || !await openChat(id, true)) newChat();
}

(async () => {
  showSide(wide.matches);
  await store.recover().catch(() => say("This browser keeps no chats: they won't outlive this tab."));
  const id = location.hash.slice(1) || (await store.list().catch(() => []))[0]?.id || "new";
  if (id === "new" || !await openChat(id, true)) { place("new", true); begin(); }
  store.listen(heard);
  about();
})();
