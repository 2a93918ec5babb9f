"use strict";
// Numbers and elements. Text of a run reaches the page through textContent alone.

const Format = {
  // A number for the eye: enough digits to tell neighbours apart, no more.
  number(value) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-3) return value.toExponential(2);
    if (Number.isInteger(value)) return value.toLocaleString("en-US");
    return value.toFixed(size >= 1000 ? 1 : size >= 100 ? 2 : size >= 10 ? 3 : 4);
  },
  count(value) {
    const sizes = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
    for (const [size, letter] of sizes) {
      if (value >= size) return parseFloat((value / size).toPrecision(3)) + letter;
    }
    return String(Math.round(value));
  },
  integer(value) { return Math.round(value).toLocaleString("en-US"); },
  duration(seconds) {
    const total = Math.round(seconds), hours = Math.floor(total / 3600);
    const two = (n) => String(n).padStart(2, "0");
    const days = Math.floor(hours / 24);
    return (days ? days + "d " : "") + (hours % 24) + ":" + two(Math.floor(total / 60) % 60) + ":" + two(total % 60);
  },
  tickDuration(seconds) {
    if (seconds === 0) return "0";
    const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
    const [size, unit] = units.find(([size]) => seconds >= size) || [1, "s"];
    return parseFloat((seconds / size).toFixed(2)) + " " + unit;
  },
  gib(value) { return value === null || value === undefined ? "–" : value.toFixed(2) + " GiB"; },
  percent(value) { return value === null || value === undefined ? "–" : (100 * value).toFixed(1) + "%"; },
};

// make("td", {class: "num", onclick: f}, "text", child, ...)
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// From the ninth run on colours come again, with dashes.
function swatch(index) {
  const ink = `var(--run-${index % 8})`;
  const style = index < 8 ? { background: ink } : { border: `2px dashed ${ink}` };
  return make("span", { class: "swatch", style });
}
