/**
 * Tiles over the picture: tints those that were computed, and paints those that alone may change.
 *
 * A mask is a text of one 0 or 1 for each tile, row by row; "" is none. Knows nothing of the wire.
 */

const $ = (id) => document.getElementById(id);
const COMPUTED = "#38b6ff55";
const PAINTED = "#ffc83877";
const BRUSH = "#ffffff66";
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

export class Regions {
  #rows = 0;
  #columns = 0;
  #computed = "";
  #painted = new Set();
  #painting = false;
  #adding = true; // a stroke adds, or takes away where it began on a painted tile
  #tinting = false;
  #brush = 0; // the tile that the keys are at

  /** onPaint(mask) is called after each stroke. */
  constructor(onPaint) {
    this.onPaint = onPaint;
    $("tint").addEventListener("click", () => {
      this.#tinting = !this.#tinting;
      this.#draw();
    });
    $("paint").addEventListener("click", () => {
      this.#painting = !this.#painting;
      this.#draw();
      if (this.#painting) $("tiles").focus();
    });
    $("unpaint").addEventListener("click", () => {
      this.#painted.clear();
      this.#tell();
    });
    const canvas = $("tiles");
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.#adding = !this.#painted.has(this.#tileAt(event));
      this.#stroke(event);
    });
    canvas.addEventListener("pointermove", (event) => event.buttons && this.#stroke(event));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    for (const change of ["focus", "blur"]) canvas.addEventListener(change, () => this.#draw());
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => this.#tell());
  }

  /** tiles: rows and columns of the model; null where it cannot hold any. */
  adopt(tiles) {
    const [rows, columns] = tiles ?? [0, 0];
    if (rows === this.#rows && columns === this.#columns) return;
    this.#rows = rows;
    this.#columns = columns;
    this.#brush = 0;
    this.#painted.clear();
    Object.assign($("tiles"), { width: columns, height: rows });
    this.#draw();
  }

  /**
   * A chunk was made. active: the computed tiles, "" for all. saved: the share of a dense chunk's time that sparse ones
   * were measured to save; null until that is known.
   */
  tell({ active, active_fraction, chunk_ms, saved }) {
    this.#computed = active || "1".repeat(this.#rows * this.#columns);
    const computed = Math.round(100 * active_fraction);
    const less = saved >= 0 ? "less" : "more";
    const measured = `A sparse chunk takes ${Math.round(100 * Math.abs(saved))} % ${less} time than a dense one.`;
    $("regions-meter").value = [
      `Computed: ${computed} % of the tiles, ${Math.round(chunk_ms)} ms a chunk.`,
      ...(saved === null ? [] : [measured]),
    ].join(" ");
    this.#draw();
  }

  /** Without dial and mask nothing is told any more. */
  follow({ regions, paint }) {
    if (regions || paint) return;
    this.#computed = "";
    $("regions-meter").value = "";
    this.#draw();
  }

  #tileAt(event) {
    const box = $("tiles").getBoundingClientRect();
    const part = (at, from, length, count) =>
      Math.min(count - 1, Math.max(0, Math.floor(((at - from) / length) * count)));
    const row = part(event.clientY, box.top, box.height, this.#rows);
    return row * this.#columns + part(event.clientX, box.left, box.width, this.#columns);
  }

  #stroke(event) {
    this.#painted[this.#adding ? "add" : "delete"](this.#tileAt(event));
    this.#draw();
  }

  /** Arrow keys go from tile to tile, space paints or wipes. */
  #key(event) {
    const step = STEPS[event.key];
    if (!this.#painting || !(step || event.key === " ")) return;
    event.preventDefault();
    event.stopPropagation();
    const columns = this.#columns;
    if (step) {
      const row = Math.min(this.#rows - 1, Math.max(0, Math.floor(this.#brush / columns) + step[0]));
      this.#brush = row * columns + Math.min(columns - 1, Math.max(0, (this.#brush % columns) + step[1]));
      this.#draw();
    } else {
      this.#painted[this.#painted.has(this.#brush) ? "delete" : "add"](this.#brush);
      this.#tell();
    }
    const place = `Row ${Math.floor(this.#brush / columns) + 1}, column ${(this.#brush % columns) + 1}`;
    $("brush").value = `${place}: ${this.#painted.has(this.#brush) ? "painted" : "not painted"}.`;
  }

  #tell() {
    const cells = Array.from({ length: this.#rows * this.#columns }, (_, tile) => (this.#painted.has(tile) ? "1" : "0"));
    this.onPaint(this.#painted.size ? cells.join("") : "");
    this.#draw();
  }

  #draw() {
    const canvas = $("tiles");
    canvas.hidden = !(this.#tinting || this.#painting || this.#painted.size) || !this.#columns;
    canvas.classList.toggle("painting", this.#painting);
    canvas.tabIndex = this.#painting ? 0 : -1;
    $("tint").setAttribute("aria-pressed", String(this.#tinting));
    $("paint").setAttribute("aria-pressed", String(this.#painting));
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, canvas.width, canvas.height);
    for (let tile = 0; tile < this.#rows * this.#columns; tile += 1) {
      const at = [tile % this.#columns, Math.floor(tile / this.#columns), 1, 1];
      if (this.#tinting && this.#computed[tile] === "1") Object.assign(pen, { fillStyle: COMPUTED }).fillRect(...at);
      if (this.#painted.has(tile)) Object.assign(pen, { fillStyle: PAINTED }).fillRect(...at);
      if (this.#painting && tile === this.#brush && document.activeElement === canvas) {
        Object.assign(pen, { fillStyle: BRUSH }).fillRect(...at);
      }
    }
  }
}
