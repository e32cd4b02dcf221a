/**
 * Figures about the stream, as seen by this viewer, and the overlay that shows them.
 *
 * Prompt to picture: from sending to the first frame that was received after the server's `shown` (sent as the
 * first new frame leaves for its encoder). Encoding, network, decoding and the player are in it; the screen is not.
 */

const WINDOW_MS = 2_000;

export class Meter {
  #video;
  #times_ms = [];
  #sent_ms = new Map();
  #due = null;
  #last = null;
  #hasFrameCallback;

  /** onPicture(latency_ms) is called for each prompt whose picture has been seen. */
  constructor(video, onPicture) {
    this.#video = video;
    this.onPicture = onPicture;
    this.#hasFrameCallback = "requestVideoFrameCallback" in video;
    if (this.#hasFrameCallback) video.requestVideoFrameCallback(this.#onFrame);
  }

  sent(id) {
    this.#sent_ms.set(id, performance.now());
  }

  /** The server says that the first frame of change `id` has left. */
  shown(id) {
    const sent_ms = this.#sent_ms.get(id);
    for (const known of this.#sent_ms.keys()) if (known <= id) this.#sent_ms.delete(known);
    if (sent_ms === undefined) return;
    if (this.#hasFrameCallback) this.#due = { sent_ms, shown_ms: performance.now() };
    else this.onPicture(performance.now() - sent_ms);
  }

  clear() {
    this.#times_ms = [];
    this.#sent_ms.clear();
    this.#due = null;
    this.#last = null;
  }

  #onFrame = (now_ms, frame) => {
    this.#times_ms.push(now_ms);
    const received_ms = frame.receiveTime ?? now_ms;
    if (this.#due && received_ms >= this.#due.shown_ms) {
      const { sent_ms } = this.#due;
      this.#due = null;
      this.onPicture(now_ms - sent_ms);
    }
    this.#video.requestVideoFrameCallback(this.#onFrame);
  };

  /** Reads one RTCStatsReport. Rates are null until two reports have been read. */
  read(report) {
    const entries = [...report.values()];
    const inbound = entries.find(({ type, kind }) => type === "inbound-rtp" && kind === "video");
    const pair = entries.find(({ type, nominated }) => type === "candidate-pair" && nominated);
    const now_ms = performance.now();
    this.#times_ms = this.#times_ms.filter((time_ms) => now_ms - time_ms < WINDOW_MS);
    const before = this.#last;
    this.#last = inbound ? { bytes: inbound.bytesReceived, at_ms: inbound.timestamp } : null;
    const since_ms = before && inbound ? inbound.timestamp - before.at_ms : 0;
    return {
      fps: this.#hasFrameCallback ? this.#times_ms.length / (WINDOW_MS / 1000) : (inbound?.framesPerSecond ?? null),
      kbit_per_s: since_ms > 0 ? (8 * (inbound.bytesReceived - before.bytes)) / since_ms : null,
      dropped: inbound?.framesDropped ?? null,
      lost: inbound?.packetsLost ?? null,
      round_trip_ms: pair?.currentRoundTripTime === undefined ? null : pair.currentRoundTripTime * 1000,
      codec: report.get?.(inbound?.codecId)?.mimeType?.replace("video/", "") ?? null,
      size: inbound?.frameWidth ? `${inbound.frameWidth}×${inbound.frameHeight}` : null,
    };
  }
}

const round = (value, unit = "", digits = 0) =>
  value === null || value === undefined ? "–" : `${Number(value).toFixed(digits)}${unit && ` ${unit}`}`;

/** Fills the overlay. `seen` comes from Meter.read, `server` from the last `stats` message. */
export function drawOverlay(list, { seen, server, model, state, latency_ms, session }) {
  const chunk_play_ms = model ? (1000 * model.frames_per_chunk) / model.fps : null;
  const rows = [
    ["State", session ? `${state} · ${String(session).slice(0, 8)}` : state],
    ["Picture", `${round(seen.fps, "fps", 1)}${model ? ` of ${model.fps}` : ""}`],
    ["Chunk", `${round(server.chunk_ms, "ms")}${chunk_play_ms ? ` for ${round(chunk_play_ms, "ms")} of video` : ""}`],
    ["Prompt to picture", round(latency_ms, "ms")],
    ["Bitrate", round(seen.kbit_per_s, "kbit/s")],
    ["Dropped", `${round(server.dropped_frames)} by server · ${round(seen.dropped)} here`],
    ["Network", `${round(seen.round_trip_ms, "ms")} · ${round(seen.lost)} packets lost`],
    ["Queue", `${round(server.queue_frames)} frames`],
    ["Camera", round(server.camera_fps, "fps", 1)],
    ["Format", [seen.size, seen.codec].filter(Boolean).join(" ") || "–"],
  ];
  list.replaceChildren(...rows.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
}

function element(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}
