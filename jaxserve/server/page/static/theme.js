// Light or dark: as the system says, until the reader chooses. Runs before the first paint.
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => {
    try {
      return localStorage.getItem("jaxserve.theme");
    } catch {
      return null; // storage may be forbidden
    }
  };
  let choice = ["light", "dark"].includes(stored()) ? stored() : "system";

  const apply = () => {
    const theme = choice === "system" ? (system.matches ? "dark" : "light") : choice;
    document.documentElement.dataset.theme = theme;
    document.dispatchEvent(new CustomEvent("themechange"));
  };
  system.addEventListener("change", apply);
  apply();

  window.jaxserveTheme = {
    get choice() {
      return choice;
    },
    next() {
      choice = { system: "light", light: "dark", dark: "system" }[choice];
      try {
        localStorage.setItem("jaxserve.theme", choice);
      } catch {
        // then for this visit only
      }
      apply();
      return choice;
    },
  };
})();
