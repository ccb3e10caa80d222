"use strict";
const settings = JSON.parse(document.getElementById("settings").textContent);
const presets = Object.fromEntries(settings.presets);
const $ = (id) => document.getElementById(id);
const SLIDER = 300, OTHERS = 150, LONG = 4000; // milliseconds

let made = 0; // cards, for ids
let wanted = 0; // number of the newest set that was asked for
let busy = false; // a request is under way; there is never more than one
let timer = 0; // of a set that will be asked for in a moment
let begun = false; // whether a set was ever asked for: only then a change draws again

const cards = () => [...$("users").querySelectorAll(".user")];
const field = (card, name) => card.querySelector(`[data-field="${name}"]`);
const attributes = () => Object.keys(Object.values(presets)[0]);
const boxes = (card) => [...card.querySelectorAll(".bans input")];
const bans = (card) => boxes(card).filter((box) => box.checked).map((box) => box.value);

// --- users

function addUser(preset) {
  const card = $("user").content.firstElementChild.cloneNode(true);
  const id = `user-${++made}`;
  const title = card.querySelector("h2"), error = card.querySelector(".error");
  title.id = `${id}-title`;
  error.id = `${id}-error`;
  card.setAttribute("aria-labelledby", title.id);
  for (const control of card.querySelectorAll("[data-field]")) {
    control.id = `${id}-${control.dataset.field}`;
    if (!control.matches(".bans")) control.previousElementSibling.htmlFor = control.id;
    control.setAttribute("aria-describedby", error.id);
  }
  const choose = field(card, "preset");
  // On a narrow screen the pictures come first: side by side, profiles closed.
  card.querySelector(".profile").open = !matchMedia("(max-width: 560px)").matches;
  choose.value = preset;
  fill(card, preset);
  card.addEventListener("change", (event) => {
    if (event.target === choose) fill(card, choose.value);
    else choose.value = presetOf(card);
    number();
    later(OTHERS);
  });
  card.querySelector(".remove").addEventListener("click", () => removeUser(card));
  $("users").insertBefore(card, $("users").querySelector(".unprotected"));
  number();
  return card;
}

function removeUser(card) {
  const next = card.nextElementSibling?.matches(".user") ? card.nextElementSibling : card.previousElementSibling;
  card.remove();
  number();
  (next?.querySelector(".remove") ?? $("add")).focus();
  say(`User removed; ${cards().length} left.`);
}

function number() {
  cards().forEach((card, index) => {
    const preset = field(card, "preset").value;
    const own = card.querySelector(".bans summary span");
    if (own) own.textContent = bans(card).join(", ") || "none";
    card.querySelector("h2").textContent = preset ? `${index + 1}. ${preset}` : `${index + 1}. Own profile`;
    card.querySelector(".remove").setAttribute("aria-label", `Remove user ${index + 1}`);
  });
  $("add").disabled = cards().length >= settings.mostUsers;
}

function fill(card, preset) {
  for (const [name, value] of Object.entries(presets[preset])) field(card, name).value = value;
  for (const box of boxes(card)) box.checked = false;
}

function presetOf(card) {
  const same = (profile) => Object.entries(profile).every(([name, value]) => field(card, name).value === String(value));
  if (bans(card).length) return ""; // no preset has bans of its own
  return Object.keys(presets).find((name) => same(presets[name])) ?? "";
}

// --- asking for a set

function profile(card) {
  return { ...Object.fromEntries(attributes().map((name) => [name, field(card, name).value])), bans: bans(card) };
}

function collect() {
  return {
    prompt: $("prompt").value,
    users: cards().map(profile),
    seed: $("seed").value.trim(), // as text: numbers end at 2^53 here
    steps: $("steps").valueAsNumber,
    guidance: $("guidance").valueAsNumber,
    scale: $("scale").valueAsNumber,
    base: Boolean($("base")?.checked),
  };
}

function later(milliseconds) {
  if (!begun) return;
  wanted += 1; // what is on its way now is out of date
  pending(true);
  clearTimeout(timer);
  timer = setTimeout(draw, milliseconds);
}

async function draw() {
  clearTimeout(timer);
  timer = 0;
  begun = true;
  wanted += 1;
  pending(true);
  if (busy) return; // the loop below goes round once more
  busy = true;
  let mine;
  do {
    mine = wanted;
    await one(mine);
  } while (mine !== wanted && !timer); // a timer will call again
  busy = false;
}

async function one(mine) {
  const asked = collect(), shownOn = cards();
  const count = asked.users.length + (asked.base ? 1 : 0);
  say(`Drawing ${count} ${count === 1 ? "picture" : "pictures"}…`);
  const long = setTimeout(
    () => say("Still drawing. The first set with other steps, more users or no guidance compiles first."), LONG,
  );
  let reply, ok;
  try {
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body: JSON.stringify(asked), credentials: "omit", cache: "no-store" };
    const response = await fetch("/draw", options);
    [ok, reply] = [response.ok, await response.json()];
  } catch {
    [ok, reply] = [false, { error: "The program does not answer. Is it still running?", where: "" }];
  } finally {
    clearTimeout(long);
  }
  if (mine !== wanted) return; // out of date
  clearErrors();
  if (ok) show(reply, asked, shownOn);
  else refuse(reply, shownOn);
  pending(false);
}

// --- showing it

function say(text, failed = false) {
  $("status").textContent = text;
  $("status").classList.toggle("failed", failed);
}

function pending(is) {
  $("users").setAttribute("aria-busy", String(is));
  $("users").classList.toggle("pending", is);
}

function show(reply, asked, shownOn) {
  reply.users.forEach((user, index) => {
    const card = shownOn[index];
    const name = card.querySelector("h2").textContent;
    picture(card, user.picture, `${asked.prompt}, drawn for user ${name}`);
    explain(card, user, asked.scale);
  });
  const base = document.querySelector(".unprotected");
  if (base) picture(base, reply.base, `${asked.prompt}, drawn by the base model, unprotected`);
  const count = reply.users.length + (reply.base ? 1 : 0);
  say([`Drawn: ${count} ${count === 1 ? "picture" : "pictures"} in ${reply.seconds.toFixed(1)} s.`, ...reply.notes].join(" "));
}

function picture(card, source, text) {
  const frame = card.querySelector(".frame");
  const inside = document.createElement(source ? "img" : "p");
  if (source) Object.assign(inside, { src: source, alt: text });
  else Object.assign(inside, { className: "small", textContent: "no picture" });
  frame.replaceChildren(inside);
}

function explain(card, user, scale) {
  const said = card.querySelector(".said"), gates = card.querySelector(".gates");
  const unprotected = scale === 0 ? "Unprotected: at strength 0 this is the base model’s picture. " : "";
  said.hidden = !unprotected && !user.said;
  said.textContent = unprotected + (user.said ?? "");
  gates.hidden = !user.gates;
  if (!user.gates) return;
  const values = Object.entries(user.gates).sort((one, other) => other[1] - one[1]);
  const open = 1 - values.reduce((kept, [, value]) => kept * (1 - value), 1);
  card.classList.toggle("replaced", open >= 0.5 && scale > 0);
  gates.querySelector("dl").replaceChildren(...values.flatMap(([name, value]) => gate(name, value)));
}

function gate(name, value) {
  const [term, bar, shown] = ["dt", "dd", "dd"].map((tag) => document.createElement(tag));
  const inside = document.createElement("i");
  inside.style.width = `${100 * value}%`;
  term.textContent = name;
  bar.className = "bar";
  bar.setAttribute("aria-hidden", "true");
  bar.append(inside);
  shown.className = "number";
  shown.textContent = value.toFixed(2);
  return [term, bar, shown];
}

function clearErrors() {
  for (const each of document.querySelectorAll(".error")) each.textContent = "";
  for (const each of document.querySelectorAll("[aria-invalid]")) each.removeAttribute("aria-invalid");
}

// An old picture beside a changed control would be taken for its picture: after an error there is none.
function refuse(reply, shownOn) {
  for (const card of document.querySelectorAll(".card")) {
    picture(card, null);
    card.classList.remove("replaced");
    if (card.matches(".user")) explain(card, {}, 1);
  }
  const [group, index, name] = reply.where.split(".");
  const card = group === "users" && index !== undefined ? shownOn[Number(index)] : null;
  const control = card ? name && field(card, name) : document.querySelector(`[data-where="${group}"]`);
  const line = card ? card.querySelector(".error") : $(`${group}-error`);
  if (card) card.querySelector(".profile").open = true;
  if (line) line.textContent = reply.error;
  control?.setAttribute("aria-invalid", "true");
  say(`Nothing is drawn: ${reply.error}`, true);
}

// --- set-up

$("asked").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
$("scale").addEventListener("input", () => {
  $("scale-shown").textContent = $("scale").valueAsNumber.toFixed(2);
  later(SLIDER);
});
for (const id of ["seed", "steps", "guidance"]) $(id).addEventListener("change", () => later(OTHERS));
$("base")?.addEventListener("change", () => later(OTHERS));
$("next").addEventListener("click", () => {
  const seed = /^[0-9]{1,20}$/.test($("seed").value.trim()) ? BigInt($("seed").value.trim()) : -1n;
  $("seed").value = String(seed + 1n < 1n << 64n ? seed + 1n : 0n);
  later(OTHERS);
});
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    $("prompt").value = example.textContent;
    draw();
  });
}
$("add").addEventListener("click", () => {
  const used = cards().map((card) => field(card, "preset").value);
  const names = Object.keys(presets);
  const card = addUser(names.find((name) => !used.includes(name)) ?? names[0]);
  card.querySelector(".profile").open = true;
  field(card, "preset").focus();
  later(OTHERS);
});
if ($("base-card")) $("users").append($("base-card").content.cloneNode(true));
for (const preset of settings.first) addUser(preset);
