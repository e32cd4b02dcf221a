/**
 * The camera of this device: the switch, the choice of device, the small view of oneself.
 *
 * Says in plain words why a camera cannot be used. Emits `change` {track} (null when off) and `trouble`
 * {message, next}. Knows nothing of the wire or of what becomes of the pictures.
 */

const $ = (id) => document.getElementById(id);

const FORBIDDEN = [
  "The browser may not use the camera.",
  "Allow it for this page (in the address bar), then switch it on.",
];
const REASONS = {
  NotAllowedError: FORBIDDEN,
  SecurityError: FORBIDDEN,
  NotFoundError: ["No camera was found.", "Plug one in, then switch it on; the prompt works without it."],
  NotReadableError: ["The camera is busy.", "Close the other program or tab that uses it, then switch it on."],
  AbortError: ["The camera did not start.", "Close other programs that use it, then switch it on."],
};
const UNAVAILABLE = ["This browser cannot use a camera.", "Try a current Chrome, Edge, Firefox or Safari."];
const INSECURE = [
  "The camera needs a secure page.",
  "Open this page by https://, or by http://localhost on the machine that serves it.",
];

export class Webcam extends EventTarget {
  /** The size and rate of the pictures that are wanted; a camera comes near. */
  wanted = { width: 320, height: 192, fps: 16 };
  #stream = null;
  #turn = 0;

  constructor() {
    super();
    $("camera").addEventListener("change", () => this.#switch($("camera").checked));
    $("device").addEventListener("change", () => this.#switch(true));
    navigator.mediaDevices?.addEventListener("devicechange", () => this.#stream && this.#drawDevices());
  }

  toggle() {
    return this.#switch(!this.#stream);
  }

  /** How much the camera's picture can shrink and still cover the wanted one. */
  get shrink() {
    const { width, height } = this.#stream?.getVideoTracks()[0].getSettings() ?? {};
    return width ? Math.min(width / this.wanted.width, height / this.wanted.height) : 1;
  }

  async #switch(on) {
    const turn = ++this.#turn; // a later switch overtakes one that still waits for permission
    close(this.#stream);
    this.#stream = null;
    const stream = on ? await this.#open().catch((trouble) => this.#complain(trouble)) : null;
    if (turn !== this.#turn) return close(stream);
    this.#stream = stream;
    const track = stream?.getVideoTracks()[0] ?? null;
    $("camera").checked = Boolean(track);
    $("selfview").srcObject = stream;
    $("selfview").hidden = !track;
    this.#emit("change", { track });
    if (!track) return;
    track.addEventListener("ended", () => {
      this.#complain(["The camera stopped.", "Plug it in again or choose another, then switch it on."]);
      this.#switch(false);
    });
    await this.#drawDevices();
  }

  /** Opens the chosen camera, or any when that one is gone. Throws a [message, next]. */
  async #open() {
    if (!navigator.mediaDevices?.getUserMedia) throw window.isSecureContext ? UNAVAILABLE : INSECURE;
    const { width, height, fps } = this.wanted;
    const near = { width: { ideal: width * 2 }, height: { ideal: height * 2 }, frameRate: { ideal: fps, max: 30 } };
    const deviceId = $("device").value;
    const choices = deviceId ? [{ ...near, deviceId: { exact: deviceId } }, near, true] : [near, true];
    for (const video of choices) {
      try {
        return await navigator.mediaDevices.getUserMedia({ video, audio: false });
      } catch ({ name }) {
        if (name === "OverconstrainedError" && video !== true) continue;
        throw REASONS[name] ?? [`The camera did not start (${name}).`, "Try another camera or browser."];
      }
    }
  }

  /** Names of devices are known only once one of them has been allowed. */
  async #drawDevices() {
    const current = this.#stream?.getVideoTracks()[0].getSettings().deviceId;
    const devices = await navigator.mediaDevices.enumerateDevices();
    const cameras = devices.filter(({ kind }) => kind === "videoinput");
    $("device").replaceChildren(
      ...cameras.map(
        ({ deviceId, label }, index) =>
          new Option(label || `Camera ${index + 1}`, deviceId, false, deviceId === current),
      ),
    );
    $("device-row").hidden = cameras.length === 0;
  }

  #complain([message, next]) {
    this.#emit("trouble", { message, next });
    return null;
  }

  #emit(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }
}

function close(stream) {
  stream?.getTracks().forEach((track) => track.stop());
}
