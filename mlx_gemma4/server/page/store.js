"use strict";
// Chats in IndexedDB, record by record: tabs that write at the same time write records of their own, and tell each other.
// chats: {id, title, created, updated, leaf, from, settings}. leaf: the last message that is shown; from: the first that is sent.
// messages: {id, chat, parent, role, content, created, media?, thinking?, note?, error?, full?, stats?}: a tree by `parent`.
const store = (() => {
  const channel = new BroadcastChannel("mlx-gemma4"), OLD = "mlx-gemma4", UNSAVED = "mlx-gemma4-unsaved:";
  let opened = null;

  const done = request => new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

  function open() {
    return opened ||= new Promise((resolve, reject) => {
      const request = indexedDB.open("mlx-gemma4", 1);
      request.onupgradeneeded = () => {
        request.result.createObjectStore("chats", { keyPath: "id" });
        request.result.createObjectStore("messages", { keyPath: "id" }).createIndex("chat", "chat");
      };
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  }

  // Runs `work` on both stores in one transaction; its value, once all of it is on disk.
  async function within(mode, work) {
    const transaction = (await open()).transaction(["chats", "messages"], mode);
    const ended = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    const value = await work(transaction.objectStore("chats"), transaction.objectStore("messages"));
    await ended;
    return value;
  }

  const list = async () => (await within("readonly", chats => done(chats.getAll()))).sort((a, b) => b.updated - a.updated);
  const read = id => within("readonly", async (chats, messages) => {
    const [chat, found] = await Promise.all([done(chats.get(id)), done(messages.index("chat").getAll(id))]);
    return chat && { chat, messages: found.sort((a, b) => a.created - b.created) };
  });

  // Changes these fields of a chat, which is made where it is missing, and puts these messages. `live`: one that is being written.
  async function write(id, fields, messages = [], live = null) {
    await within("readwrite", async (chats, all) => {
      for (const message of messages) all.put({ ...message, chat: id });
      const known = await done(chats.get(id));
      const now = Date.now(), empty = { title: "New chat", created: now, updated: now, settings: {}, from: null, leaf: null };
      chats.put({ ...empty, ...known, ...fields, ...(messages.length && { updated: now }), id });
    });
    channel.postMessage({ chat: id, live });
  }

  async function remove(id) {
    await within("readwrite", async (chats, messages) => {
      chats.delete(id);
      for (const key of await done(messages.index("chat").getAllKeys(id))) messages.delete(key);
    });
    channel.postMessage({ chat: id, gone: true });
  }

  // Ids of the chats with these words in their title or in a message.
  async function search(words) {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean), texts = new Map();
    await within("readonly", async (chats, messages) => {
      for (const { id, title } of await done(chats.getAll())) texts.set(id, [title]);
      for (const { chat, content } of await done(messages.getAll())) texts.get(chat)?.push(content);
    });
    return new Set([...texts].filter(([, all]) => {
      const text = all.join("\n").toLowerCase();
      return wanted.every(word => text.includes(word));
    }).map(([id]) => id));
  }

  // A window that closes has no time for IndexedDB: its reply waits here for the next one.
  function spill(id, fields, message) {
    try { localStorage.setItem(UNSAVED + message.id, JSON.stringify({ id, fields, message })); } catch { /* full: what was saved last must do */ }
  }

  // Takes over what windows that closed have left, and what the page kept before it had many chats.
  async function recover() {
    for (const key of Object.keys(localStorage)) {
      if (key !== OLD && !key.startsWith(UNSAVED)) continue;
      const text = localStorage.getItem(key);
      localStorage.removeItem(key); // first: another tab does the same
      try {
        const found = JSON.parse(text);
        if (key === OLD) await migrate(found);
        else if (found.message.role === "assistant") await write(found.id, found.fields, [found.message]);
      } catch { /* not ours, or damaged */ }
    }
  }

  async function migrate({ messages, settings }) {
    const sound = m => ["user", "assistant"].includes(m?.role) && typeof m.content === "string";
    if (!messages.length || !messages.every(sound)) return;
    const id = newId(), now = Date.now(), made = [];
    for (const m of messages) made.push({ ...m, id: newId(), parent: made.at(-1)?.id ?? null, created: now + made.length });
    await write(id, { title: titleOf(messages[0].content), settings: settings || {}, leaf: made.at(-1).id }, made);
  }

  return { list, read, write, remove, search, spill, recover, listen: heard => { channel.onmessage = event => heard(event.data); } };
})();

function newId() {
  return Date.now().toString(36) + "-" + [...crypto.getRandomValues(new Uint32Array(2))].map(n => n.toString(36)).join("");
}

// Small things by name: settings, drafts. The key stays with the tab.
const kept = {
  get: name => { try { return JSON.parse(localStorage.getItem("mlx-gemma4-" + name)); } catch { return null; } },
  set: (name, value) => {
    try {
      if (value) localStorage.setItem("mlx-gemma4-" + name, JSON.stringify(value));
      else localStorage.removeItem("mlx-gemma4-" + name);
    } catch { /* nothing is kept here */ }
  },
};
