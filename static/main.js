/**
 * Joins the page: buttons and keys to the session, the session's events to what is seen and said.
 *
 * All words about the stream's state are here; errors carry their own.
 */

import { Controls } from "./controls.js";
import { Link, hasWebRTC } from "./peer.js";
import { Picture } from "./picture.js";
import { Regions } from "./regions.js";
import { Meter, drawOverlay } from "./stats.js";
import { Webcam } from "./webcam.js";

const $ = (id) => document.getElementById(id);
const WORDS = {
  idle: "Ready",
  connecting: "Connecting…",
  waiting: "Waiting for the server.",
  live: "Live",
  paused: "Paused",
  recovering: "The generator is starting again; your stream goes on by itself.",
  closed: "The session has ended.",
};
const NOTED = new Set(["connecting", "waiting", "closed"]); // where the server's note adds to these words

const link = new Link(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`);
const controls = new Controls();
const webcam = new Webcam();
const picture = new Picture();
const regions = new Regions((paint) => controls.set({ paint }));
const view = {
  state: "idle",
  session: "",
  model: null,
  server: {}, // the newest `stats`
  prompt: "", // the prompt that the server has
  promptId: null,
  begun_ms: 0,
  latency_ms: null,
};
const meter = new Meter($("video"), (latency_ms) => {
  view.latency_ms = latency_ms;
  $("applied").value = `Applied in ${Math.round(latency_ms)} ms.`;
});

// --- what is said and seen -----------------------------------------------------------------------------------------

function enter(state, note = "") {
  view.state = state;
  document.body.dataset.state = state;
  say(NOTED.has(state) ? `${WORDS[state]} ${note}`.trim() : WORDS[state]);
  const running = link.running;
  const hadFocus = [$("start"), $("stop")].includes(document.activeElement);
  $("start").hidden = running;
  $("stop").hidden = !running;
  if (hadFocus) $(running ? "stop" : "start").focus();
  for (const id of ["pause", "reset"]) $(id).disabled = !running;
  drawPause();
}

function say(words) {
  $("status").textContent = words;
  $("news").textContent = words;
}

function drawPause() {
  const { paused } = controls.wishes;
  $("pause").querySelector("span").textContent = paused ? "Go on" : "Pause";
  $("pause").querySelector("use").setAttribute("href", paused ? "#i-play" : "#i-pause");
  $("pause").title = paused ? "Go on (p)" : "Pause (p)";
}

function complain(message, next = "", from = "page") {
  $("trouble").dataset.from = from;
  $("trouble").querySelector("strong").textContent = message;
  $("trouble").querySelector("span").textContent = next;
  $("trouble").hidden = false;
}

function explainWebRTC() {
  complain(
    "This browser cannot receive live video (it has no WebRTC).",
    "Open the page in a current Chrome, Edge, Firefox or Safari.",
  );
}

function forgive() {
  $("trouble").hidden = true;
}

// --- the session ---------------------------------------------------------------------------------------------------

function toggleStream() {
  if (link.running) link.stop();
  else if (controls.draft) controls.submit(controls.draft);
  else begin();
}

function begin() {
  if (!hasWebRTC()) {
    explainWebRTC();
    return;
  }
  forgive();
  controls.wishes.paused = false;
  view.begun_ms = performance.now();
  link.start();
}

/** Keeps the last picture on the screen while a lost connection is made again. */
function keepStill() {
  const { videoWidth: width, videoHeight: height } = $("video");
  if (!width) return;
  Object.assign($("still"), { width, height, hidden: false }).getContext("2d").drawImage($("video"), 0, 0);
  $("video").srcObject = null;
}

function sendPrompt(prompt) {
  if (prompt === view.prompt) {
    $("applied").value = "This prompt is already playing.";
    return;
  }
  const id = link.send("controls", { prompt });
  if (id === null) return; // it goes with the other wishes once there is a connection
  Object.assign(view, { prompt, promptId: id });
  meter.sent(id);
  $("applied").value = controls.wishes.paused ? "Sent; it is drawn when you go on." : "Sent…";
}

function drawUnknown(words) {
  $("unknown").textContent = words.length ? `This model does not know: ${words.join(", ")}.` : "";
}

const on = (kind, act) => link.addEventListener(kind, ({ detail }) => act(detail));

on("trying", ({ attempt }) => enter("connecting", attempt ? `Attempt ${attempt + 1}.` : ""));
on("welcome", ({ session, model, defaults }) => {
  Object.assign(view, { session, model, server: {} });
  drawUnknown([]);
  adopt(model, defaults);
  if (picture.data) link.send("picture", { data: picture.data });
  const { prompt, ...others } = controls.wishes;
  link.send("controls", prompt ? { prompt, ...others } : others);
  view.prompt = prompt;
});
on("track", ({ stream }) => {
  $("video").srcObject = stream;
  $("video").play().catch((error) => {
    if (error.name !== "NotAllowedError") return;
    complain("The browser holds the video back.", "Press the picture to play it.");
  });
});
on("state", ({ state, note }) => {
  if (state === "live" && $("trouble").dataset.from === "server") forgive();
  enter(state, note);
});
on("ack", ({ id, chunk }) => {
  if (id === view.promptId) $("applied").value = `Taken on with chunk ${chunk}…`;
});
on("shown", ({ id }) => meter.shown(id));
on("regions", (told) => regions.tell(told));
on("notice", ({ unknown_words }) => drawUnknown(unknown_words));
on("stats", (stats) => {
  view.server = stats;
  if (stats.camera_fps > 0 && $("trouble").dataset.from === "camera") forgive();
});
on("error", ({ code, message, next }) => {
  const refused = code.startsWith("picture_");
  if (refused) picture.refuse();
  view.prompt = ""; // perhaps it was the prompt that was refused: let it be sent again
  // That the stream goes live makes up for what the server had to say of the stream, not of a picture.
  complain(message, next, code === "camera_stopped" ? "camera" : refused ? "picture" : "server");
});
on("losing", keepStill);
on("lost", ({ wait_ms, reason }) => {
  meter.clear();
  Object.assign(view, { session: "", server: {}, prompt: "" });
  view.begun_ms = performance.now();
  enter("connecting");
  say(`${reason} Trying again in ${Math.max(1, Math.round(wait_ms / 1000))} s…`);
});
on("ended", () => {
  meter.clear();
  $("video").srcObject = null;
  $("still").hidden = true;
  Object.assign(view, { session: "", server: {}, prompt: "" });
  $("applied").value = "";
  drawUnknown([]);
  enter("idle");
});

controls.addEventListener("change", ({ detail }) => {
  if ("prompt" in detail) forgive();
  if ("regions" in detail || "paint" in detail) regions.follow(controls.wishes);
  if (!link.running && "prompt" in detail) begin();
  else if ("prompt" in detail) sendPrompt(detail.prompt);
  else link.send("controls", detail);
  drawPause();
});

// --- the camera ----------------------------------------------------------------------------------------------------

webcam.addEventListener("trouble", ({ detail }) => complain(detail.message, detail.next));
webcam.addEventListener("change", async ({ detail: { track } }) => {
  await link.setCamera(track, webcam.shrink);
  if (controls.wishes.camera !== Boolean(track)) controls.set({ camera: Boolean(track) });
});

picture.addEventListener("trouble", ({ detail }) => complain(detail.message, detail.next));
picture.addEventListener("change", ({ detail: { data } }) => {
  forgive();
  if (link.running) link.send("picture", { data });
  else if (data) begin();
});

// --- buttons and keys ----------------------------------------------------------------------------------------------

const actions = {
  s: toggleStream,
  p: () => link.running && controls.set({ paused: !controls.wishes.paused }),
  r: () => link.send("reset"),
  c: () => webcam.toggle(),
  i: () => {
    $("overlay").hidden = !$("overlay").hidden;
    $("figures").setAttribute("aria-pressed", String(!$("overlay").hidden));
    measure();
  },
  f: () => {
    if (document.fullscreenElement) document.exitFullscreen();
    else if ($("stage").requestFullscreen) $("stage").requestFullscreen();
    else $("video").webkitEnterFullscreen?.();
  },
  "/": () => $("prompt").focus(),
  "?": () => ($("help").open ? $("help").close() : $("help").showModal()),
};
const buttons = { start: "s", stop: "s", pause: "p", reset: "r", figures: "i", fullscreen: "f", "help-open": "?" };
for (const [id, key] of Object.entries(buttons)) $(id).addEventListener("click", () => actions[key]());

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("textarea, select, input:not([type=checkbox]):not([type=range])");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat || !$("shortcuts").checked) return;
  if ($("help").open && event.key !== "?") return;
  const act = actions[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
});
$("trouble-close").addEventListener("click", forgive);
$("video").addEventListener("loadeddata", () => {
  $("still").hidden = true;
  $("applied").value = `First picture after ${Math.round(performance.now() - view.begun_ms)} ms.`;
});
$("video").addEventListener("click", () => $("video").srcObject && $("video").play());

async function measure() {
  const seen = meter.read(await link.report());
  if (!$("overlay").hidden) drawOverlay($("overlay"), { ...view, seen });
}
setInterval(measure, 1000);

function adopt(model, defaults) {
  controls.adopt(model, defaults);
  if (model) webcam.wanted = picture.wanted = model;
  if (model) regions.adopt(model.tiles);
  if (model?.width) document.documentElement.style.setProperty("--aspect", String(model.width / model.height));
}

/** Asks for the model before there is a session, so that its examples can be seen. It may still be loading. */
async function introduce() {
  if (view.model) return;
  let told = {};
  try {
    const answer = await fetch("/api/info");
    if (answer.ok) told = await answer.json();
  } catch {
    // the server is gone; Start says so
  }
  if (!told.model) setTimeout(introduce, 3000); // only the examples are missing until then
  else if (!view.model) adopt(told.model, told.defaults);
}

// --- first sight ---------------------------------------------------------------------------------------------------

enter("idle");
if (!hasWebRTC()) {
  $("start").disabled = true;
  explainWebRTC();
}
introduce();
