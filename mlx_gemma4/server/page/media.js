"use strict";
// Pictures, sounds and videos that go with a message: chosen, pasted, dropped or spoken. A message keeps them as
// media: [{kind, name, url}], url being data: with base64.
const KINDS = ["image", "audio", "video"], MOST_BYTES = 32e6; // of one, as the server has it
let takes = []; // kinds that the model takes
let attached = []; // what goes with the next message
let recorder = null; // the MediaRecorder while it hears

// A message's content as the API has it: its media, then its text.
function contentOf({ content, media }) {
  if (!media?.length) return content;
  const parts = media.map(({ kind, url }) => kind === "audio"
    ? { type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1), format: /^data:audio\/([\w]*)/.exec(url)?.[1] || "wav" } }
    : { type: kind + "_url", [kind + "_url"]: { url } });
  return content ? [...parts, { type: "text", text: content }] : parts;
}

const readAs = file => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

async function attach(files) {
  for (const file of files) {
    const kind = KINDS.find(each => file.type.startsWith(each + "/")), name = file.name || "pasted";
    if (!takes.includes(kind)) { say(`${name}: this model takes ${takes.join(", ")} and text.`); continue; }
    if (file.type.includes("svg")) { say(`${name}: an SVG is a drawing; make it a PNG first.`); continue; }
    if (file.size > MOST_BYTES) { say(`${name} has ${bytes(file.size)}: ${bytes(MOST_BYTES)} are the most.`); continue; }
    try {
      // Of a recording, the type may name its codec with spaces or quotes, which a data: URL has no place for.
      const url = (await readAs(file)).replace(/^data:(\w+\/[\w.+-]+)[^,]*,/, "data:$1;base64,");
      if (!DATA.test(url)) throw new Error("empty");
      attached.push({ kind, name, url });
      say(`Attached ${name}.`);
    } catch { say(`${name} can't be read.`); }
  }
  showAttached();
  input.focus();
}

// `beside`: its name stands beside it.
function viewOf({ kind, name, url }, beside = false) {
  if (kind === "image") return element("img", { src: url, alt: beside === true ? "" : name });
  return element(kind, { src: url, controls: true, "aria-label": name, title: name, preload: "metadata" });
}

function showAttached() {
  $("attached").hidden = !attached.length;
  $("attached").replaceChildren(...attached.map(media => element("li", {}, viewOf(media, true),
    element("span", { class: "name", dir: "auto" }, media.name),
    iconButton("close", `Remove ${media.name}`, () => {
      attached = attached.filter(other => other !== media);
      showAttached(); input.focus();
    }))));
}

function takeAttached() {
  const taken = attached;
  attached = [];
  showAttached();
  return taken.length ? { media: taken } : {};
}

// What the model takes, as the server's list says.
function showTakes(kinds) {
  takes = KINDS.filter(kind => kinds?.includes(kind));
  $("attach").hidden = !takes.length;
  $("pick").accept = takes.map(kind => kind + "/*").join(",");
  $("speak").hidden = !takes.includes("audio") || !navigator.mediaDevices?.getUserMedia || !window.MediaRecorder;
  attached = attached.filter(({ kind }) => takes.includes(kind));
  showAttached();
}

// The first press begins to hear, the second one attaches what was heard.
async function speak() {
  if (recorder) return recorder.stop();
  let stream;
  try { stream = await navigator.mediaDevices.getUserMedia({ audio: true }); }
  catch { return say("There is no microphone, or this page may not use it."); }
  const pieces = [];
  recorder = new MediaRecorder(stream);
  recorder.ondataavailable = event => pieces.push(event.data);
  recorder.onstop = () => {
    const { mimeType } = recorder;
    recorder = null;
    for (const track of stream.getTracks()) track.stop();
    $("speak").setAttribute("aria-pressed", "false");
    const type = (mimeType || "audio/webm").replace(/^video/, "audio").split(";")[0];
    attach([new File(pieces, `recording ${new Date().toLocaleTimeString()}.${type.split("/")[1]}`, { type })]);
  };
  recorder.start();
  $("speak").setAttribute("aria-pressed", "true");
  say("Listening: press again to end.");
}

$("attach").addEventListener("click", () => $("pick").click());
$("pick").addEventListener("change", async () => { await attach([...$("pick").files]); $("pick").value = ""; });
$("speak").addEventListener("click", speak);
input.addEventListener("paste", event => {
  const files = [...event.clipboardData?.files || []];
  if (files.length && takes.length) { event.preventDefault(); attach(files); }
});
for (const name of ["dragover", "drop", "dragleave"]) {
  document.addEventListener(name, event => {
    if (!takes.length || !event.dataTransfer?.types.includes("Files")) return;
    if (name !== "dragleave") event.preventDefault();
    $("composer").classList.toggle("over", name === "dragover");
    if (name === "drop") attach([...event.dataTransfer.files]);
  });
}
