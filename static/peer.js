/**
 * One session with the server: a WebSocket for signalling and control, a peer connection for media.
 *
 * Speaks the wire and reconnects by itself until stop(). Knows nothing of the page's elements, nor what a
 * prompt means. Every server message is an event named by its `kind`; besides these there are
 * `losing` while the last picture can still be read, `lost` {attempt, wait_ms, reason} when it will try again,
 * `trying`, `ended`, and `track` {stream}.
 */

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 10_000;
const PING_EVERY_MS = 4_000;
const SILENCE_MS = 15_000;
const MEDIA_GRACE_MS = 5_000;
const CAMERA_BITS_PER_S = 900_000;

export const hasWebRTC = () =>
  typeof RTCPeerConnection === "function" && "addTransceiver" in RTCPeerConnection.prototype;

export class Link extends EventTarget {
  #url;
  #wanted = false;
  #socket = null;
  #peer = null;
  #sender = null;
  #camera = null;
  #cameraScale = 1;
  #attempt = 0;
  #lastId = 0;
  #heard_ms = 0;
  #timers = { retry: 0, ping: 0, media: 0 };

  constructor(url) {
    super();
    this.#url = url;
    addEventListener("online", () => this.#wanted && !this.#socket && this.#connect());
  }

  get running() {
    return this.#wanted;
  }

  start() {
    if (this.#wanted) return;
    this.#wanted = true;
    this.#attempt = 0;
    this.#connect();
  }

  stop() {
    this.#wanted = false;
    this.#release();
    this.#emit("ended", {});
  }

  /** Sends a message that will be answered by its id; returns the id, or null while there is no open socket. */
  send(kind, fields = {}) {
    const id = this.#lastId + 1;
    if (!this.#say({ kind, id, ...fields })) return null;
    return (this.#lastId = id);
  }

  #say(message) {
    const open = this.#socket?.readyState === WebSocket.OPEN;
    if (open) this.#socket.send(JSON.stringify(message));
    return open;
  }

  /** Gives the camera's track (or null) to this and every later connection; `scale` shrinks it before sending. */
  async setCamera(track, scale = 1) {
    this.#camera = track;
    this.#cameraScale = Math.max(1, scale);
    await this.#attachCamera();
  }

  async report() {
    return this.#peer ? this.#peer.getStats() : new Map();
  }

  #connect() {
    this.#release();
    this.#emit("trying", { attempt: this.#attempt });
    const socket = new WebSocket(this.#url);
    this.#socket = socket;
    this.#heard_ms = performance.now();
    socket.onmessage = ({ data }) => socket === this.#socket && this.#take(JSON.parse(data));
    socket.onclose = () => socket === this.#socket && this.#lose("The connection to the server was lost.");
    this.#timers.ping = setInterval(() => {
      if (performance.now() - this.#heard_ms > SILENCE_MS) this.#lose("The server went silent.");
      else this.send("ping");
    }, PING_EVERY_MS);
  }

  #take(message) {
    this.#heard_ms = performance.now();
    if (message.kind === "error" && message.fatal) {
      this.#wanted = false;
      this.#release();
    }
    this.#emit(message.kind, message);
    const steps = { welcome: this.#offer, answer: this.#accept };
    steps[message.kind]
      ?.call(this, message)
      .catch((error) => this.#lose(`The video connection could not be made (${error.name}).`));
    if (message.kind === "error" && message.fatal) this.#emit("ended", {});
  }

  async #offer({ ice_servers }) {
    const peer = new RTCPeerConnection({ iceServers: ice_servers ?? [] });
    this.#peer = peer;
    const transceiver = peer.addTransceiver("video", {
      direction: "sendrecv",
      sendEncodings: [{ maxBitrate: CAMERA_BITS_PER_S }],
    });
    this.#sender = transceiver.sender;
    playAtOnce(transceiver.receiver);
    peer.ontrack = ({ track }) => this.#emit("track", { stream: new MediaStream([track]) });
    peer.onicecandidate = ({ candidate }) => {
      if (peer !== this.#peer) return;
      const { candidate: line, sdpMid = null, sdpMLineIndex = null } = candidate ?? {};
      this.#say({ kind: "candidate", candidate: line || null, sdpMid, sdpMLineIndex });
    };
    peer.onconnectionstatechange = () => peer === this.#peer && this.#watchMedia(peer.connectionState);
    await this.#attachCamera();
    await peer.setLocalDescription();
    if (peer === this.#peer) this.#say({ kind: "offer", sdp: peer.localDescription.sdp });
  }

  async #accept({ sdp }) {
    const peer = this.#peer;
    await peer.setRemoteDescription({ type: "answer", sdp });
    await this.#attachCamera();
  }

  async #attachCamera() {
    const sender = this.#sender;
    if (!sender) return;
    await sender.replaceTrack(this.#camera);
    const parameters = sender.getParameters();
    if (!this.#camera || !parameters.encodings?.length) return;
    parameters.encodings[0].scaleResolutionDownBy = this.#cameraScale;
    await sender.setParameters(parameters).catch(() => {}); // a browser that refuses sends the full size
  }

  #watchMedia(state) {
    clearTimeout(this.#timers.media);
    if (state === "connected") this.#attempt = 0;
    const why = "The video cannot get through; a firewall may be in the way.";
    if (state === "failed") this.#lose(why);
    if (state === "disconnected") this.#timers.media = setTimeout(() => this.#lose(why), MEDIA_GRACE_MS);
  }

  #lose(reason) {
    if (!this.#wanted) return this.#release();
    this.#emit("losing", {});
    this.#release();
    const steady_ms = Math.min(LONGEST_WAIT_MS, FIRST_WAIT_MS * 2 ** this.#attempt);
    const wait_ms = Math.round(steady_ms * (0.75 + Math.random() / 2)); // spread, so that pages do not return at once
    this.#attempt += 1;
    this.#emit("lost", { attempt: this.#attempt, wait_ms, reason });
    this.#timers.retry = setTimeout(() => this.#connect(), wait_ms);
  }

  #release() {
    clearTimeout(this.#timers.retry);
    clearInterval(this.#timers.ping);
    clearTimeout(this.#timers.media);
    const [socket, peer] = [this.#socket, this.#peer];
    this.#socket = this.#peer = this.#sender = null;
    socket?.close();
    peer?.close();
  }

  #emit(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }
}

/** Asks the browser to show frames as they come instead of smoothing over a buffer. */
function playAtOnce(receiver) {
  if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0;
  if ("playoutDelayHint" in receiver) receiver.playoutDelayHint = 0;
}
