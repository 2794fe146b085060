// Keys and double clicks of the labelling page. An answer goes out once for each pair: between a press and the next pair, and for
// a moment after it, presses are ignored, so that a double click or a key held down never labels a pair that nobody has read.
() => {
  const CHOICES = { a: "choice_a", b: "choice_b", t: "choice_tie", n: "choice_both_bad", s: "choice_skip", u: "undo" };
  const ACTIONS = Object.values(CHOICES);
  const PAUSE = 300; // milliseconds after a new pair; a double click is shorter
  const GIVE_UP = 10000; // milliseconds: if no reply came, pressing again is safe, the server stores an answer once
  let lockedUntil = 0;

  const locked = () => performance.now() < lockedUntil;
  const writing = (element) =>
    element.isContentEditable ||
    ((element.tagName === "TEXTAREA" || (element.tagName === "INPUT" && !["radio", "button"].includes(element.type))) &&
      !element.readOnly &&
      !element.disabled);
  const usable = (element) => element && element.offsetParent !== null && !element.disabled;

  document.addEventListener(
    "click",
    (event) => {
      const button = event.target.closest("button");
      if (!button || !ACTIONS.includes(button.id)) return;
      if (locked() || event.detail > 1) {
        event.preventDefault();
        event.stopImmediatePropagation();
        return;
      }
      lockedUntil = performance.now() + GIVE_UP;
      document.body.dataset.labels = "waiting";
    },
    true,
  );

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
    if (writing(event.target)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const key = event.key.toLowerCase();
    if (key in CHOICES) {
      const button = document.getElementById(CHOICES[key]);
      if (!event.repeat && usable(button)) button.click();
    } else if (/^[1-5]$/.test(key) && !locked()) {
      const option = document.querySelectorAll("#confidence input[type=radio]")[Number(key) - 1];
      if (usable(option?.closest("label"))) option.click();
    } else return;
    event.preventDefault();
  });

  // Gradio measures a box while it is still hidden, and then it is too low; label_page.css bounds the height.
  const fit = () => {
    for (const box of document.querySelectorAll("#prompt textarea, #left textarea, #right textarea")) {
      box.style.height = "auto";
      box.style.height = `${box.scrollHeight + 2}px`;
      box.scrollTop = 0;
    }
  };
  window.addEventListener("resize", fit);

  window.labels = {
    // Called when the server's reply is on the page.
    ready() {
      requestAnimationFrame(() => setTimeout(fit, 50));
      lockedUntil = performance.now() + PAUSE;
      document.body.dataset.labels = "ready";
      if (document.activeElement?.tagName === "BUTTON") document.activeElement.blur(); // Enter must not press it again
      window.scrollTo(0, 0);
    },
  };
}
