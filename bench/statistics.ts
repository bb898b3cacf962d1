export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  const upper = sorted[middle] as number;
  return sorted.length % 2 === 1 ? upper : (upper + (sorted[middle - 1] as number)) / 2;
}

export interface Summary {
  median: number;
  /** The ends of the middle half. */
  low: number;
  high: number;
}

export function summarize(values: readonly number[], digits = 0): Summary {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (share: number) => round(sorted[Math.round((sorted.length - 1) * share)] as number, digits);
  return { median: round(median(values), digits), low: at(0.25), high: at(0.75) };
}

/** Median, and the range of the middle half: `231 (226 to 240)`. */
export function summary(values: readonly number[], digits = 0): string {
  const { median, low, high } = summarize(values, digits);
  return `${format(median, digits)} (${format(low, digits)} to ${format(high, digits)})`;
}

export function round(value: number, digits: number): number {
  return Number(value.toFixed(digits));
}

export function format(value: number, digits = 0): string {
  return value.toLocaleString('en', { minimumFractionDigits: digits, maximumFractionDigits: digits });
}
