"use strict";
// From values to pixels and back, and where the ticks stand.

class Scale {
  constructor(low, high, from, to, log) {
    this.log = log && low > 0;
    this.low = low;
    this.high = high > low ? high : low + (Math.abs(low) || 1) * (this.log ? 1 : 0.1);
    this.from = from;
    this.to = to;
  }

  static fold(value, log) { return log ? Math.log10(value) : value; }

  at(value) {
    const low = Scale.fold(this.low, this.log), high = Scale.fold(this.high, this.log);
    return this.from + (Scale.fold(value, this.log) - low) / (high - low) * (this.to - this.from);
  }

  value(pixel) {
    const low = Scale.fold(this.low, this.log), high = Scale.fold(this.high, this.log);
    const folded = low + (pixel - this.from) / (this.to - this.from) * (high - low);
    return this.log ? 10 ** folded : folded;
  }

  // axis: the sizes of its steps, or the least one.
  ticks(most, axis) {
    return this.log ? this.logTicks(most) : this.evenTicks(most, axis);
  }

  evenTicks(most, { steps = null, least = 0 } = {}) {
    const rough = (this.high - this.low) / Math.max(1, most), nice = Math.max(least, niceStep(rough));
    const step = steps ? steps.find((size) => size >= rough) || niceStep(rough / 86400) * 86400 : nice;
    const found = [];
    for (let n = Math.ceil(this.low / step - 1e-9); n * step <= this.high * (1 + 1e-12) + 1e-300; n++) {
      found.push(parseFloat((n * step).toPrecision(12)));
    }
    return found;
  }

  logTicks(most) {
    const first = Math.floor(Math.log10(this.low)), last = Math.ceil(Math.log10(this.high));
    const inside = (factors) => {
      const found = [];
      for (let power = first; power <= last; power++) {
        for (const factor of factors) {
          const value = parseFloat((factor * 10 ** power).toPrecision(12));
          if (value >= this.low * 0.999999 && value <= this.high * 1.000001) found.push(value);
        }
      }
      return found;
    };
    for (const factors of [[1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
      const found = inside(factors);
      if (found.length <= most + 1) return found.length >= 2 ? found : this.evenTicks(most);
    }
    const powers = inside([1]), every = Math.ceil(powers.length / most);
    return powers.filter((_, index) => index % every === 0);
  }
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999999) * power;
}

const TIME_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];

// Index of the value nearest to x in a rising list.
function nearest(list, x) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] <= x) low = middle; else high = middle;
  }
  return high >= 0 && Math.abs(list[high] - x) < Math.abs(list[low] - x) ? high : low;
}
