"use strict";
// Sorts the before-and-after cards and shows the first of them until asked for all. Without scripts the page is complete, sorted by gain.
(function () {
  const list = document.getElementById("cards");
  const status = document.getElementById("sorted");
  const buttons = Array.from(document.querySelectorAll("button[data-sort]"));
  if (!list || buttons.length === 0) return;
  document.documentElement.classList.add("scripted");
  const more = document.getElementById("more");
  if (more) {
    more.addEventListener("click", () => {
      list.classList.remove("short");
      more.remove();
    });
  }
  const gain = (card) => Number(card.dataset.gain);
  const place = (a, b) => Number(a.dataset.place) - Number(b.dataset.place);
  const orders = {
    gain: (a, b) => gain(b) - gain(a) || place(a, b),
    loss: (a, b) => gain(a) - gain(b) || place(a, b),
    prompt: (a, b) => a.dataset.prompt.localeCompare(b.dataset.prompt) || place(a, b),
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const cards = Array.from(list.children).sort(orders[button.dataset.sort]);
      list.append(...cards);
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      status.textContent = "Sorted: " + button.textContent;
    });
  }
})();
