import { judgeAudit } from '../tools/packaging/audit';

const clean = { auditReportVersion: 2, vulnerabilities: {}, metadata: { vulnerabilities: { total: 0 }, dependencies: { total: 12 } } };

describe('what npm audit has said', () => {
  it('is clean if it has found nothing', () => {
    expect(judgeAudit(JSON.stringify(clean))).toEqual({ isClean: true, text: 'npm audit: nothing found in 12 packages.' });
  });

  it('is not if it has found something, however slight', () => {
    const found = {
      name: 'left-pad',
      severity: 'low',
      range: '<1.3.0',
      via: [],
      effects: [],
      nodes: [],
      isDirect: false,
      fixAvailable: true,
    };
    const { isClean, text } = judgeAudit(JSON.stringify({ ...clean, vulnerabilities: { 'left-pad': found } }));
    expect(isClean).toBe(false);
    expect(text).toContain('left-pad <1.3.0: low');
  });

  it.each([
    ['npm cannot reach it', { message: 'request failed', error: { summary: '', detail: '' } }, 'request failed'],
    ['it has no such service', { error: { summary: '405 Method Not Allowed', detail: '' } }, '405 Method Not Allowed'],
    ['there is another service in its place', { ok: true }, 'no report'],
    ['it answers in no JSON', 'gone', 'no report'],
  ])('is unknown, and says so aloud, if %s', (_case, answer, reason) => {
    const { isClean, text } = judgeAudit(typeof answer === 'string' ? answer : JSON.stringify(answer));
    expect(isClean).toBeUndefined();
    expect(text).toMatch(/^SKIPPED/);
    expect(text).toContain(reason);
  });
});
