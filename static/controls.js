/**
 * What the viewer wants, and the elements that say it: prompt, seed, strength, structure, regions.
 *
 * Holds the one copy of the wishes, so that a new connection can ask for the same again. Emits `change` with the
 * fields that changed. Knows nothing of the wire.
 */

const HISTORY_KEY = "stillstream.prompts";
const HISTORY_LENGTH = 20;
const SLIDERS = ["strength", "structure"]; // of the camera
const DIALS = ["regions", "lora_strength"]; // sliders that need no camera
const COUNTS = ["glide_chunks", "steps"];
const SWITCHES = ["motion_aware"]; // of the camera
const CHOICES = ["transition", "lora"];
const SLIDER_EVERY_MS = 120;
const LARGEST_SEED = 2 ** 31 - 1;

// One line of text is what the server takes; a new line in the box is for the eye.
const oneLine = (text) => text.replace(/[\s\p{Cc}]+/gu, " ").trim();

const $ = (id) => document.getElementById(id);

export class Controls extends EventTarget {
  wishes = {
    prompt: "",
    seed: 7,
    strength: 0.6,
    structure: 0,
    regions: 0,
    paint: "",
    transition: "cut",
    glide_chunks: 4,
    steps: 0,
    lora: "",
    lora_strength: 1,
    motion_aware: false,
    paused: false,
    camera: false,
  };
  #touched = new Set();
  #history = readHistory();
  #place = -1; // in the history; -1: a text of one's own
  #moved = new Set(); // sliders whose new place is not told yet

  constructor() {
    super();
    $("prompt-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit($("prompt").value);
    });
    $("prompt").addEventListener("keydown", (event) => this.#onPromptKey(event));
    $("prompt").addEventListener("input", () => {
      this.#place = -1;
      this.#count();
    });
    $("seed").addEventListener("change", () => this.#setSeed($("seed").valueAsNumber));
    $("dice").addEventListener("click", () => this.#setSeed(Math.floor(Math.random() * LARGEST_SEED)));
    for (const name of [...SLIDERS, ...DIALS, ...COUNTS]) $(name).addEventListener("input", () => this.#slide(name));
    for (const name of CHOICES) $(name).addEventListener("change", () => this.set({ [name]: $(name).value }));
    for (const name of SWITCHES) $(name).addEventListener("change", () => this.set({ [name]: $(name).checked }));
    this.#draw();
  }

  /** Takes the server's model and defaults; what the viewer has already chosen stays. */
  adopt(model, defaults = {}) {
    if (model?.prompt_limit) $("prompt").maxLength = model.prompt_limit;
    for (const [name, value] of Object.entries(defaults)) {
      if (name in this.wishes && !this.#touched.has(name)) this.wishes[name] = value;
    }
    if (!$("prompt").value && document.activeElement !== $("prompt")) $("prompt").value = this.wishes.prompt;
    if (model) $("structure-part").hidden = !model.structure;
    if (model) $("regions-part").hidden = !model.tiles;
    if (model) $("steps-part").hidden = !model.any_steps;
    if (model) this.#offer(model.loras ?? []);
    if (model?.examples) this.#list($("examples"), model.examples);
    this.#draw();
  }

  /** The low-rank weights that can be worn; one that is gone is no wish any more. */
  #offer(names) {
    $("lora-part").hidden = names.length === 0;
    $("lora").replaceChildren(new Option("none", ""), ...names.map((name) => new Option(name, name)));
    if (!names.includes(this.wishes.lora)) this.wishes.lora = "";
  }

  /** The text in the box, where it differs from the prompt that was last sent. */
  get draft() {
    const text = oneLine($("prompt").value);
    return text === this.wishes.prompt ? "" : text;
  }

  /** Takes a prompt as the wish. An empty box asks for nothing new. */
  submit(text) {
    const prompt = oneLine(text);
    if (!prompt) return;
    $("prompt").value = prompt;
    this.#remember(prompt);
    this.#place = 0;
    this.set({ prompt });
  }

  /** Changes wishes and tells. */
  set(fields) {
    Object.assign(this.wishes, fields);
    for (const name of Object.keys(fields)) this.#touched.add(name);
    this.#draw();
    this.#emit(fields);
  }

  #setSeed(value) {
    const seed = Number.isFinite(value) ? Math.min(LARGEST_SEED, Math.max(0, Math.floor(value))) : this.wishes.seed;
    this.set({ seed });
  }

  #slide(name) {
    this.wishes[name] = Number($(name).value);
    this.#draw();
    if (this.#moved.size === 0) {
      setTimeout(() => {
        const fields = Object.fromEntries([...this.#moved].map((moved) => [moved, this.wishes[moved]]));
        this.#moved.clear();
        this.set(fields);
      }, SLIDER_EVERY_MS);
    }
    this.#moved.add(name);
  }

  #onPromptKey(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.submit($("prompt").value);
    }
    if (event.key === "Escape") $("prompt").blur();
    const step = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!step || ($("prompt").value && this.#place < 0)) return;
    const place = Math.min(this.#history.length - 1, this.#place + step);
    if (this.#place < 0 && place < 0) return;
    event.preventDefault();
    this.#place = place;
    $("prompt").value = this.#history[place] ?? "";
    this.#count();
  }

  #remember(prompt) {
    this.#history = [prompt, ...this.#history.filter((text) => text !== prompt)].slice(0, HISTORY_LENGTH);
    writeHistory(this.#history);
  }

  #draw() {
    const { seed, camera } = this.wishes;
    $("seed").value = seed;
    for (const name of [...SLIDERS, ...DIALS]) {
      $(name).value = this.wishes[name];
      $(name).disabled = SLIDERS.includes(name) && !camera;
      $(`${name}-value`).value = `${Math.round(this.wishes[name] * 100)} %`;
    }
    for (const name of SWITCHES) {
      $(name).checked = this.wishes[name];
      $(name).disabled = !camera;
    }
    $("earlier").hidden = this.#history.length === 0;
    this.#list($("history"), this.#history);
    for (const name of COUNTS) {
      $(name).value = this.wishes[name];
      $(`${name}-value`).value = this.wishes[name] || "the model's own";
    }
    for (const name of CHOICES) $(name).value = this.wishes[name];
    $("glide-part").hidden = this.wishes.transition !== "glide";
    this.#count();
  }

  #count() {
    const { value, maxLength } = $("prompt");
    $("count").textContent = maxLength > 0 && value.length > 0.8 * maxLength ? `${value.length} of ${maxLength}` : "";
  }

  /** Fills a list with choices; whoever stood on one of them still stands on it. */
  #list(list, texts) {
    if (texts.join("\n") === [...list.children].map((item) => item.textContent).join("\n")) return;
    const focused = list.contains(document.activeElement) ? document.activeElement.textContent : null;
    list.replaceChildren(...texts.map((text) => this.#choice(text)));
    if (focused !== null) [...list.querySelectorAll("button")].find((button) => button.textContent === focused)?.focus();
  }

  #choice(text) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.addEventListener("click", () => this.submit(text));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }

  #emit(fields) {
    this.dispatchEvent(new CustomEvent("change", { detail: fields }));
  }
}

function readHistory() {
  try {
    const kept = JSON.parse(localStorage.getItem(HISTORY_KEY) ?? "[]");
    return Array.isArray(kept) ? kept.filter((text) => typeof text === "string").slice(0, HISTORY_LENGTH) : [];
  } catch {
    return []; // storage is blocked or damaged: the page works without a history
  }
}

function writeHistory(history) {
  try {
    localStorage.setItem(HISTORY_KEY, JSON.stringify(history));
  } catch {
    // as above
  }
}
