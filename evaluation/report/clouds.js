"use strict";
// Point clouds on plain canvases. Clouds of one scene turn together: drag to turn, wheel or + and - to come nearer, arrow keys.
(function () {
  const LOW = [44, 62, 140], MIDDLE = [62, 168, 130], HIGH = [240, 190, 60];
  const mix = (a, b, t) => a.map((value, i) => Math.round(value + t * (b[i] - value)));
  const colour = (t) => (t < 0.5 ? mix(LOW, MIDDLE, 2 * t) : mix(MIDDLE, HIGH, 2 * t - 1));
  const palette = Array.from({ length: 64 }, (_, i) => colour(i / 63));

  function decoded(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return new Int16Array(bytes.buffer);
  }

  function draw(view, state, reach) {
    const { canvas, points } = view;
    const context = canvas.getContext("2d");
    const width = canvas.width, height = canvas.height;
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const depth = new Float32Array(width * height).fill(Infinity);
    const scale = (state.zoom * Math.min(width, height)) / (2 * reach);
    const ca = Math.cos(state.turn), sa = Math.sin(state.turn), ce = Math.cos(state.tilt), se = Math.sin(state.tilt);
    for (let i = 0; i < points.length; i += 3) {
      const x = ca * points[i] - sa * points[i + 1];
      const y = sa * points[i] + ca * points[i + 1];
      const z = points[i + 2];
      const column = Math.round(width / 2 + scale * x);
      const row = Math.round(height / 2 - scale * (y * se + z * ce));
      const away = y * ce - z * se;
      if (column < 1 || row < 1 || column >= width - 1 || row >= height - 1) continue;
      const shade = palette[Math.max(0, Math.min(63, Math.floor(((z - view.low) / view.span) * 64)))];
      const value = (255 << 24) | (shade[2] << 16) | (shade[1] << 8) | shade[0];
      for (const place of [row * width + column, row * width + column + 1, (row + 1) * width + column]) {
        if (away < depth[place]) {
          depth[place] = away;
          pixels[place] = value;
        }
      }
    }
    context.putImageData(image, 0, 0);
  }

  for (const scene of document.querySelectorAll("[data-scene]")) {
    const reach = Number(scene.dataset.reach), low = Number(scene.dataset.low), span = Number(scene.dataset.span);
    const views = Array.from(scene.querySelectorAll("canvas")).map((canvas) => ({
      canvas, points: decoded(canvas.dataset.points), low, span,
    }));
    const state = { turn: 0.6, tilt: 0.7, zoom: 1.1 };
    let waiting = false;
    const redraw = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        for (const view of views) draw(view, state, reach);
      });
    };
    const moved = (turn, tilt, zoom) => {
      state.turn += turn;
      state.tilt = Math.max(0, Math.min(Math.PI / 2, state.tilt + tilt));
      state.zoom = Math.max(0.5, Math.min(12, state.zoom * zoom));
      redraw();
    };
    const keys = {
      ArrowLeft: [-0.1, 0, 1], ArrowRight: [0.1, 0, 1], ArrowUp: [0, 0.1, 1], ArrowDown: [0, -0.1, 1],
      "+": [0, 0, 1.15], "-": [0, 0, 1 / 1.15],
    };
    for (const { canvas } of views) {
      canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
      canvas.addEventListener("pointermove", (event) => {
        if (event.buttons) moved(event.movementX / 120, event.movementY / 120, 1);
      });
      canvas.addEventListener("wheel", (event) => {
        event.preventDefault();
        moved(0, 0, event.deltaY < 0 ? 1.1 : 1 / 1.1);
      }, { passive: false });
      canvas.addEventListener("keydown", (event) => {
        if (!(event.key in keys)) return;
        event.preventDefault();
        moved(...keys[event.key]);
      });
    }
    redraw();
  }
})();
