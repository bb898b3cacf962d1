import type { Request } from 'express';
import type { Settings } from './beginning';
import { SessionError } from './errors';
import type { PerRequest } from './options';
import {
  dependsOnRequest,
  type FixedTerms,
  fixedFor,
  pairsOf,
  type ResolvedOptions,
  type Terms,
  termsOf,
  valueFor,
  withAdded,
} from './resolve-options';

type Pairs = readonly [name: string, value: string][];

/** What holds for a session: the options of its middleware, what its route has changed of them, and what `session.set()` has added. Immutable. */
export class SessionPolicy {
  /** The same for each request, if no option is a function. */
  private fixed: FixedTerms | undefined;
  private terms: Terms | undefined;

  constructor(
    readonly options: ResolvedOptions,
    private readonly routeSettings: readonly PerRequest<Settings>[] = [],
    private readonly added: Pairs = [],
  ) {}

  /** The application's settings hold as well: what row-level security reads must not go because a route adds a timeout. */
  with({ settings, ...others }: Partial<ResolvedOptions>): SessionPolicy {
    const routeSettings = settings === undefined ? this.routeSettings : [...this.routeSettings, settings];
    return new SessionPolicy({ ...this.options, ...others }, routeSettings, this.added);
  }

  adding(settings: Pairs): SessionPolicy {
    return new SessionPolicy(this.options, this.routeSettings, [...this.added, ...settings]);
  }

  /** Asks the options' functions. @throws TypeError or SessionError as {@link fixedFor} */
  fixedFor(req: Request): FixedTerms {
    if (this.fixed) return this.fixed;
    const fixed = fixedFor(this.options, req);
    if (this.routeSettings.length === 0) {
      if (!dependsOnRequest(this.options)) this.fixed = fixed;
      return fixed;
    }
    const ofRoute = this.routeSettings.flatMap((settings) => pairsOf(settings, req));
    return { ...fixed, settings: withAdded(fixed.settings, ofRoute) };
  }

  /** @param others what a hook's own session has set */
  termsOf(fixed: FixedTerms, others: Pairs): Terms {
    const added = others.length === 0 ? this.added : [...this.added, ...others];
    if (fixed !== this.fixed || added.length > 0) return termsOf(fixed, added);
    this.terms ??= termsOf(fixed, added);
    return this.terms;
  }

  wantsAutocommit(req: Request): boolean {
    const { transaction, settings, role } = this.options;
    if (transaction === true || valueFor('transaction', transaction, req)) return false;
    if (settings === undefined && role === undefined && this.added.length === 0 && this.routeSettings.length === 0) return true;
    throw new SessionError('ERR_SESSION_OPTIONS', SETTINGS_NEED_A_TRANSACTION);
  }
}

const SETTINGS_NEED_A_TRANSACTION =
  '`settings` and `role` hold for one transaction, and this request has none ({ transaction: false }). Leave one of them out.';
