// The theme gives the search dialog no accessible name, and boxes that scroll cannot be reached with the keyboard.
addEventListener("load", () => {
  const name = (selector, label) => document.querySelectorAll(selector).forEach((each) => each.setAttribute("aria-label", label));
  name(".md-search[role=dialog]", "Search");
  const reach = () => document.querySelectorAll(".md-typeset__scrollwrap, pre > code, .md-sidebar__scrollwrap").forEach((each) => {
    each.tabIndex = each.scrollWidth > each.clientWidth || each.scrollHeight > each.clientHeight ? 0 : -1;
  });
  reach();
  addEventListener("resize", reach);
});
