import { requirePeer } from '../peers';

/** Panels side by side, each with a bar for each name; the names are written once. */
export interface Chart {
  title: string;
  subtitle: string;
  panels: { title: string; bars: Bar[] }[];
}

interface Bar {
  label: string;
  value: number;
  text: string;
  isOurs: boolean;
}

const themes = {
  light: { text: '#1f2328', muted: '#59636e', ours: '#0969da', others: '#b6bfc9' },
  dark: { text: '#f0f6fc', muted: '#9198a1', ours: '#4493f8', others: '#555d67' },
};

const WIDTH = 880;
const NAMES = 214;
const GAP = 14;
const ROW = 25;
const TOP = 80;
/** Of a panel's width, for the longest bar; the rest is for what is written behind it. */
const LONGEST = 0.6;

export function drawBars({ title, subtitle, panels }: Chart, theme: keyof typeof themes): string {
  const colors = themes[theme];
  const rows = Math.max(...panels.map(({ bars }) => bars.length));
  const height = TOP + rows * ROW + 4;
  const width = (WIDTH - NAMES) / panels.length - GAP;
  const leftOf = (index: number) => NAMES + index * (width + GAP);
  const chart = requirePeer('echarts').init(null, null, { renderer: 'svg', ssr: true, width: WIDTH, height });
  chart.setOption({
    animation: false,
    textStyle: { fontFamily: 'system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif' },
    title: [
      {
        text: title,
        subtext: subtitle,
        left: 0,
        top: 2,
        padding: 0,
        itemGap: 6,
        textStyle: { fontSize: 16, fontWeight: 600, color: colors.text },
        subtextStyle: { fontSize: 12, color: colors.muted },
      },
      ...panels.map((panel, i) => ({
        text: panel.title,
        left: leftOf(i),
        top: TOP - 24,
        padding: 0,
        textStyle: { fontSize: 12, fontWeight: 600, color: colors.text },
      })),
    ],
    grid: panels.map((_, i) => ({ left: leftOf(i), width, top: TOP, height: rows * ROW })),
    xAxis: panels.map(({ bars }, i) => ({
      gridIndex: i,
      type: 'value',
      show: false,
      min: 0,
      max: Math.max(...bars.map(({ value }) => value)) / LONGEST,
    })),
    yAxis: panels.map(({ bars }, i) => ({
      gridIndex: i,
      type: 'category',
      inverse: true,
      data: bars.map(({ label }) => label),
      axisLine: { show: false },
      axisTick: { show: false },
      axisLabel: { show: i === 0, fontSize: 12, color: colors.text, width: NAMES - 10, margin: 8 },
    })),
    series: panels.map(({ bars }, i) => ({
      type: 'bar',
      xAxisIndex: i,
      yAxisIndex: i,
      barWidth: 15,
      silent: true,
      data: bars.map(({ value, text, isOurs }) => ({
        value,
        itemStyle: { color: isOurs ? colors.ours : colors.others, borderRadius: [0, 2, 2, 0] },
        label: { show: true, position: 'right', distance: 5, formatter: text, fontSize: 12, color: isOurs ? colors.text : colors.muted },
      })),
    })),
  });
  const svg: string = chart.renderToSVGString();
  chart.dispose();
  // Not every renderer knows the baseline.
  return svg.replaceAll('dominant-baseline="central"', 'dy="0.35em"').replace('<svg ', `<svg role="img" aria-label="${title}" `);
}
