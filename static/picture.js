/**
 * The picture that the stream begins with: chosen by the button or dropped onto the video, and cleared again.
 *
 * A large file is made smaller here, so that it passes the wire; what the server says of it is not known here. Keeps the
 * picture, so that a new connection can begin with it too. Emits `change` {data} (base64, null when cleared) and
 * `trouble` {message, next}.
 */

const LARGEST_BYTES = 512 * 1024; // of a file that goes as it is; the server takes no larger one
const QUALITIES = [0.92, 0.8, 0.6, 0.4];

const $ = (id) => document.getElementById(id);

export class Picture extends EventTarget {
  /** The size that is wanted. */
  wanted = { width: 320, height: 192 };
  #now = { data: null, name: "" };
  #before = this.#now; // what the server keeps if it refuses the newest one
  #turn = 0;

  constructor() {
    super();
    const [screen, file] = [document.querySelector(".screen"), $("picture-file")];
    $("picture").addEventListener("click", () => file.click());
    $("unpicture").addEventListener("click", () => {
      $("picture").focus();
      this.#turn++;
      this.#set(null, "");
    });
    file.addEventListener("change", () => {
      if (file.files.length) this.#take(file.files[0]);
      file.value = ""; // so that the same file can be chosen again
    });
    for (const kind of ["dragover", "dragleave", "drop"]) {
      screen.addEventListener(kind, (event) => {
        if (!event.dataTransfer?.types.includes("Files")) return;
        event.preventDefault();
        screen.classList.toggle("dropping", kind === "dragover");
        if (kind === "drop" && event.dataTransfer.files.length) this.#take(event.dataTransfer.files[0]);
      });
    }
  }

  get data() {
    return this.#now.data;
  }

  /** The server did not take the newest one, and keeps to the one before. */
  refuse() {
    this.#now = this.#before;
    this.#draw();
  }

  async #take(file) {
    const turn = ++this.#turn; // a later choice overtakes one that is still being read
    let data;
    try {
      data = await inBase64(file.size > LARGEST_BYTES ? await this.#smaller(file) : file);
    } catch {
      if (turn !== this.#turn) return;
      this.#emit("trouble", {
        message: "The browser cannot read this file as a picture.",
        next: "Choose another one, such as a JPEG or PNG.",
      });
      return;
    }
    if (turn !== this.#turn) return;
    this.#set(data, file.name);
  }

  /** A picture that still covers twice the wanted size, in a file that is small enough. */
  async #smaller(file) {
    const picture = await createImageBitmap(file);
    const { width, height } = this.wanted;
    const scale = Math.min(1, Math.max((2 * width) / picture.width, (2 * height) / picture.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(picture.width * scale));
    canvas.height = Math.max(1, Math.round(picture.height * scale));
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    picture.close();
    for (const quality of QUALITIES) {
      const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", quality));
      if (blob && blob.size <= LARGEST_BYTES) return blob;
    }
    throw new Error("it stays too large");
  }

  #set(data, name) {
    this.#before = this.#now;
    this.#now = { data, name };
    this.#draw();
    this.#emit("change", { data });
  }

  #draw() {
    const { data, name } = this.#now;
    $("unpicture").hidden = data === null;
    $("picture-name").value = data === null ? "" : `Now: ${name}.`;
  }

  #emit(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }
}

function inBase64(blob) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => fail(reader.error);
    reader.readAsDataURL(blob);
  });
}
