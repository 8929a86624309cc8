// Puts fresh parts in place every few seconds: what is open stays open, what is typed stays typed.
"use strict";
const EVERY_MS = 4000;
const parts = document.getElementById("parts");
const live = document.getElementById("live");

function filter() {
  const box = document.getElementById("filter");
  if (!box) return;
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of document.querySelectorAll("#decisions details")) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
}

async function refresh() {
  if (document.hidden) return;
  try {
    const answer = await fetch(new URL("/ui/parts", location.origin), { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    const html = await answer.text();
    const open = [...document.querySelectorAll("details[open]")].map((row) => row.id);
    const box = document.getElementById("filter");
    const typed = box ? box.value : "";
    const cursor = box && document.activeElement === box ? box.selectionStart : null;
    parts.innerHTML = html;
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    const fresh = document.getElementById("filter");
    if (fresh) {
      fresh.value = typed;
      if (cursor !== null) {
        fresh.focus({ preventScroll: true });
        fresh.setSelectionRange(cursor, cursor);
      }
      filter();
    }
    live.textContent = "live";
    live.classList.remove("stale");
  } catch {
    live.textContent = "the gateway does not answer";
    live.classList.add("stale");
  }
}

document.addEventListener("input", (event) => {
  if (event.target.id === "filter") filter();
});
setInterval(refresh, EVERY_MS);
document.addEventListener("visibilitychange", refresh);
