// Sends what is said of a pair, and shows the next one.
"use strict";
const pair = document.getElementById("pair");
const told = document.getElementById("told");
let isSending = false;

async function say(verdict) {
  if (isSending) return;
  isSending = true;
  try {
    const answer = await fetch(new URL("/ui/label", location.origin), {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ id: pair.dataset.id, verdict }),
    });
    // 409: somebody else was first.
    if (!answer.ok && answer.status !== 409) throw new Error(`${answer.status} ${answer.statusText}`);
    location.reload();
  } catch (error) {
    told.textContent = `It was not taken: ${error.message}. Try again.`;
    told.hidden = false;
    isSending = false;
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-verdict]");
  if (button) say(button.dataset.verdict);
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const button = document.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
  if (button) say(button.dataset.verdict);
});
