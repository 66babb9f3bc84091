// Brings the page's parts together: tabs, colour scheme, chat and the live view.

import { setUpChat } from "./chat.js";
import { setUpEngine } from "./engine.js";
import { byId } from "./format.js";
import { Live } from "./live.js";
import { setUpSettings, showDefaults } from "./settings.js";
import { setUpTokenTips } from "./tokens.js";

function setUpTheme() {
  const button = byId("theme");
  const show = () => {
    const choice = window.jaxserveTheme.choice;
    button.textContent = { system: "◐", light: "☀", dark: "☾" }[choice];
    const name = { system: "as the system", light: "light", dark: "dark" }[choice];
    button.title = `Colours: ${name}`;
    button.setAttribute("aria-label", `Colours: ${name}. Change`);
  };
  button.addEventListener("click", () => {
    window.jaxserveTheme.next();
    show();
  });
  show();
}

function setUpTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const select = (name) => {
    document.body.dataset.tab = name;
    const shown = tabs.filter((tab) => tab.offsetParent !== null);
    // On a screen of two columns the chat is always there, beside one of the others.
    const isBeside = shown.length && !shown.some((tab) => tab.dataset.tab === name);
    const current = isBeside ? "engine" : name;
    for (const tab of tabs) {
      const isCurrent = tab.dataset.tab === current;
      tab.setAttribute("aria-selected", String(isCurrent));
      tab.tabIndex = isCurrent ? 0 : -1;
    }
    document.dispatchEvent(new CustomEvent("tabchange"));
  };
  for (const tab of tabs) {
    tab.addEventListener("click", () => select(tab.dataset.tab));
    tab.addEventListener("keydown", (event) => {
      const shown = tabs.filter((one) => one.offsetParent !== null);
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = shown[(shown.indexOf(tab) + step + shown.length) % shown.length];
      select(next.dataset.tab);
      next.focus();
    });
  }
  addEventListener("resize", () => select(document.body.dataset.tab));
  document.addEventListener("keyneeded", () => select("sampling"));
  select("chat");
}

const live = new Live();
setUpTheme();
setUpSettings();
setUpTabs();
setUpTokenTips();
setUpChat(() => live.modelName);
setUpEngine(live);
live.onChange.push(() => showDefaults(live.now?.model?.default_sampling_params));
document.addEventListener("keychange", () => live.pollSoon());
document.addEventListener("keyneeded", () => byId("api-key").focus());
live.start();
