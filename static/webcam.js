/**
 * The camera of this device: opens it, lists the choices, says in plain words why it cannot.
 *
 * Knows nothing of the wire or of what becomes of the pictures.
 */

export class CameraError extends Error {
  constructor(message, next) {
    super(message);
    this.next = next;
  }
}

const REASONS = {
  NotAllowedError: ["The browser may not use the camera.", "Allow the camera for this page (in the address bar), then switch it on again."],
  SecurityError: ["The browser may not use the camera.", "Allow the camera for this page (in the address bar), then switch it on again."],
  NotFoundError: ["No camera was found.", "Plug one in, then switch it on again; the prompt works without it."],
  NotReadableError: ["The camera is busy.", "Close the other program or tab that uses it, then switch it on again."],
  AbortError: ["The camera did not start.", "Close other programs that use it, then switch it on again."],
};

/** Opens a camera near the wanted size. Raises CameraError. */
export async function openCamera({ deviceId = "", width = 640, height = 384, fps = 16 } = {}) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw window.isSecureContext
      ? new CameraError("This browser cannot use a camera.", "Try a current Chrome, Edge, Firefox or Safari.")
      : new CameraError("The camera needs a secure page.", "Open this page by https://, or by http://localhost on the same machine.");
  }
  const wish = { width: { ideal: width * 2 }, height: { ideal: height * 2 }, frameRate: { ideal: fps, max: 30 } };
  const choices = deviceId ? [{ ...wish, deviceId: { exact: deviceId } }, wish, true] : [wish, true];
  for (const video of choices) {
    try {
      return await navigator.mediaDevices.getUserMedia({ video, audio: false });
    } catch (error) {
      if (error.name === "OverconstrainedError" && video !== true) continue; // that device is gone: take any
      const [message, next] = REASONS[error.name] ?? [`The camera did not start (${error.name}).`, "Try another camera or browser."];
      throw new CameraError(message, next);
    }
  }
}

/** The cameras by name. Names are known only once one camera has been allowed. */
export async function listCameras() {
  const devices = await navigator.mediaDevices.enumerateDevices();
  return devices
    .filter(({ kind }) => kind === "videoinput")
    .map(({ deviceId, label }, index) => ({ deviceId, label: label || `Camera ${index + 1}` }));
}

/** How much a camera picture can shrink and still cover the model's picture. */
export function shrinkFor(track, { width, height }) {
  const settings = track.getSettings();
  return settings.width ? Math.min(settings.width / width, settings.height / height) : 1;
}
