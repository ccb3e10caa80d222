// Filters of the pictures. Without it, all of them are shown.
const rows = [...document.querySelectorAll("[data-row]")];
const said = document.querySelector("#count");
const chosen = [...document.querySelectorAll("[data-filter]")];
function filter() {
  let shown = 0;
  for (const row of rows) {
    const hidden = chosen.some((each) => {
      if (!each.value) return false;
      if (each.dataset.filter === "outcome") return row.dataset.wrong !== "yes";
      return row.dataset[each.dataset.filter] !== each.value;
    });
    row.hidden = hidden;
    if (!hidden) shown += 1;
  }
  said.textContent = `${shown} of ${rows.length} cases`;
}
for (const each of chosen) each.addEventListener("change", filter);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") for (const each of document.querySelectorAll(".cell[open]")) each.open = false;
});
document.querySelector("#filters").hidden = false;
filter();
