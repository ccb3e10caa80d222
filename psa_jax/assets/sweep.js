// Filters of the points. Without it, all of them are shown.
const chosen = [...document.querySelectorAll("[data-filter]")];
const marked = [...document.querySelectorAll("[data-overrides]")].map((each) => [each, JSON.parse(each.dataset.overrides)]);
const lines = marked.filter(([each]) => each.matches(".point"));
const said = document.querySelector("#count");
function filter() {
  for (const [each, overrides] of marked) {
    const hidden = chosen.some((by) => by.value && by.dataset.filter in overrides && overrides[by.dataset.filter] !== by.value);
    each.classList.toggle("out", hidden);
  }
  const shown = lines.filter(([each]) => !each.matches(".out")).length;
  said.textContent = `${shown} of ${lines.length} points`;
}
for (const each of chosen) each.addEventListener("change", filter);
document.querySelector("#filters").hidden = false;
filter();
