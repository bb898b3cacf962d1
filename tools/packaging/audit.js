/** @typedef {{ isClean: boolean | undefined, text: string }} Judgement `isClean` is undefined if nobody could be asked */

/**
 * What `npm audit --json` has said. A registry need not have an audit endpoint: that is told, and is no failure of ours.
 *
 * @param {string} output
 * @returns {Judgement}
 */
exports.judgeAudit = (output) => {
  const report = parse(output);
  const vulnerabilities = report?.vulnerabilities;
  if (report?.auditReportVersion === undefined || !vulnerabilities) {
    const reason = report?.message ?? report?.error?.summary ?? 'its answer is no report';
    return { isClean: undefined, text: `SKIPPED: the registry did not answer npm audit (${reason}). Nobody knows whether it is clean.` };
  }
  const found = Object.values(vulnerabilities).map(({ name, severity, range }) => `${name} ${range}: ${severity}`);
  if (found.length > 0) return { isClean: false, text: `npm audit has found:\n${found.join('\n')}` };
  return { isClean: true, text: `npm audit: nothing found in ${report.metadata?.dependencies?.total ?? 'its'} packages.` };
};

/**
 * @typedef {object} Report
 * @property {number} [auditReportVersion]
 * @property {Record<string, { name: string, severity: string, range: string }>} [vulnerabilities]
 * @property {{ dependencies?: { total?: number } }} [metadata]
 * @property {string} [message]
 * @property {{ summary?: string }} [error]
 *
 * @param {string} output
 * @returns {Report | undefined}
 */
function parse(output) {
  try {
    return JSON.parse(output);
  } catch {
    return undefined;
  }
}
