import { ServerResponse } from 'node:http';
import type { NextFunction, Request, Response } from 'express';
import { DeferredHead, type Internals, isStatusLine } from './deferred-head';
import { onClose } from './disconnect';
import { answerWithError } from './error-response';
import { areTransactionsObserved } from './events';
import { type EarlyHeaders, SavedHead } from './response-head';
import { cutConnection, HeldDrain, holdDestroy, Overrides, spareConnection } from './response-hold';

/** What a response waits for. */
export interface GateKeeper {
  /** Whether bytes may leave before it is settled; what completes the response may not. */
  readonly letsBytesFlow: boolean;
  /**
   * Settles; the response goes when this resolves, and is replaced by the error when it rejects.
   *
   * @param isBeginning whether the handler goes on writing
   * @param failure of another keeper, if there was one already
   */
  settle(isBeginning: boolean, failure?: { readonly error: unknown }): Promise<void>;
  /** What is done in place of answering with the error, once the response has been taken back; nothing if it is to be answered. */
  retry?(error: unknown): (() => void) | undefined;
  /** Receives an error that can no longer become a response. */
  report(error: unknown): void;
}

interface Failure {
  readonly error: unknown;
  readonly keeper: GateKeeper;
}

/** The request and its response, as the middleware was given them. */
export interface Exchange {
  readonly req: Request;
  readonly res: Response;
  readonly next: NextFunction;
  readonly earlyHeaders: EarlyHeaders;
}

interface Source {
  unpipe(destination: unknown): unknown;
}

type Method = (...args: any[]) => any;
const GATE = Symbol('express-knex-session.gate');

/**
 * Whether what completes a response can still be held. Not if it is on its way already; nor if its head has left and declares
 * a length, since nobody has counted the bytes that left with it.
 */
export function canStillHold(res: Response, letsBytesFlow: boolean): boolean {
  const { [GATE]: gate, _headerSent, chunkedEncoding } = res as unknown as Internals & { [GATE]?: ResponseGate };
  return gate?.settling === undefined && (!_headerSent || (letsBytesFlow && chunkedEncoding));
}

/**
 * Holds a response until it may go, then lets it go or discards it. Knows no database.
 *
 * - `open`: nothing has been asked for but headers.
 * - `streaming`: bytes flow; what completes the response will be held.
 * - `held`: calls wait in a queue, and answer as after Node's own `end` or `write`, until the keepers have settled.
 * - `passed`: the gate is out of the way.
 * - `discarded`: the error handlers answer, past the gate. Middleware inside it (compression) may still hold our methods, and bytes.
 */
export class ResponseGate {
  /** Bytes of the body that waited for the keepers; counted if anybody is told of them. */
  bytesHeld = 0;
  /** Set while the keepers settle and after; never rejects. */
  settling: Promise<void> | undefined;

  private phase: 'open' | 'streaming' | 'held' | 'passed' | 'discarded' = 'open';
  private readonly keepers: GateKeeper[] = [];
  private readonly overrides: Overrides<ServerResponse>;
  private readonly original: Record<'write' | 'end' | 'writeHead' | 'flushHeaders' | '_send', Method>;
  private readonly savedHead: SavedHead;
  private readonly drain: HeldDrain;
  private sources: Set<Source> | undefined;
  private readonly res: Response & Internals;
  private readonly head: DeferredHead;
  /** Whether anything was handed on, be it to Node or to what other middleware has put in between. */
  hasHandedOn: boolean;
  /** Whether there was a head before: middleware in between may keep what was written since. */
  readonly hadHead: boolean;
  /** Bytes to come until the response is complete, if it has declared them. */
  private remainingLength: number | undefined;
  /** Calls that wait. */
  private queue: (() => unknown)[] = [];
  private hasHandlerEnded = false;
  private isMakingHead = false;

  private constructor(private readonly exchange: Exchange) {
    const res = exchange.res as Response & Internals;
    this.res = res;
    this.savedHead = new SavedHead(res, exchange.earlyHeaders);
    this.head = new DeferredHead(res);
    this.hasHandedOn = res._headerSent;
    // An adapter (serverless-http) begins with an empty one.
    this.hadHead = Boolean(res._header);
    if (res._headerSent) this.phase = 'streaming';
    this.overrides = new Overrides<ServerResponse>(res);
    this.original = {
      write: this.overrides.set('write', (...args) => this.write(args)),
      end: this.overrides.set('end', (...args) => this.end(args)),
      writeHead: this.overrides.set('writeHead', (...args) => this.writeHead(args)),
      flushHeaders: this.overrides.set('flushHeaders', () => this.flushHeaders()),
      _send: this.overrides.set('_send', (...args) => this.send(args)),
    };
    // What all the others end in, also those that were looked up before the gate was there: `res.end(await session.first())`.
    this.overrides.set('_implicitHeader', () => this.makeHead());
    // What a compression mounted after us will put here must go with a discarded response.
    this.overrides.remember(WRAPPED_BY_COMPRESSION);
    this.drain = new HeldDrain(res);
    res.on('pipe', this.onPipe);
  }

  /** Sets a keeper at the gate of a response; all its keepers share one. */
  static keep(exchange: Exchange, keeper: GateKeeper): ResponseGate {
    const holder = exchange.res as { [GATE]?: ResponseGate };
    holder[GATE] ??= new ResponseGate(exchange);
    holder[GATE].keepers.push(keeper);
    return holder[GATE];
  }

  private readonly onPipe = (source: Source): void => {
    this.sources ??= new Set();
    this.sources.add(source);
  };

  private writeHead(args: unknown[]): unknown {
    // Node refuses a second head, and a wrong one, by itself.
    if (this.phase === 'discarded' || (this.phase === 'open' && !this.isMakingHead && this.head.take(args))) return this.res;
    return this.original.writeHead.apply(this.res, args);
  }

  /** Node's own methods need the head at once: they decide by it how to send. */
  private makeHead(): void {
    this.isMakingHead = true;
    try {
      this.res.writeHead(this.res.statusCode);
    } finally {
      this.isMakingHead = false;
    }
  }

  private send(args: unknown[]): unknown {
    const { res, original } = this;
    // With a head from before, it may be what a compression has had in hand.
    if (this.hasHandedOn || this.phase === 'passed' || (this.hadHead && this.letsBytesFlow)) return original._send.apply(res, args);
    if (this.phase === 'discarded') return true;
    const send = (): unknown => original._send.apply(res, args);
    // A head that waits was none to who has called this: it has not been told to send chunks.
    if (this.head.isWaiting) res.useChunkedEncodingByDefault = false;
    this.sendHead();
    this.noteHeld(args);
    if (this.phase === 'held') this.queue.push(send);
    else this.hold(send);
    return false;
  }

  private noteHeld([chunk, encoding]: unknown[]): void {
    if (areTransactionsObserved()) this.bytesHeld += Buffer.byteLength(chunk as string, encoding as BufferEncoding | undefined);
  }

  private flushHeaders(): void {
    if (this.phase === 'discarded') return;
    const flush = (): void => this.original.flushHeaders.call(this.res);
    // As Node does: middleware inside the gate hears of the head now, and may decide by it.
    if (this.phase === 'open' && !this.res._header) this.res.writeHead(this.res.statusCode);
    if (this.phase === 'held') this.queue.push(flush);
    else if (this.phase !== 'open') flush();
    else if (!this.letsBytesFlow) this.hold(flush);
    else if (this.head.announcesBody()) {
      this.startStreaming();
      this.handOn(flush);
    }
  }

  private write(args: unknown[]): unknown {
    const { res, original } = this;
    // One of many chunks.
    if (this.phase === 'streaming' && this.hasHandedOn && this.remainingLength === undefined) return original.write.apply(res, args);
    const write = (): unknown => original.write.apply(res, args);
    if (this.phase === 'discarded') return true;
    if (this.phase === 'passed') return write();
    if (!isChunk(args[0])) return this.letThrow(write);
    if (this.phase === 'held') {
      if (this.hasHandlerEnded) return this.asFinished(() => ServerResponse.prototype.write.apply(res, args as never));
      this.noteHeld(args);
      this.queue.push(write);
      return false;
    }
    if (this.phase === 'open' && !this.letsBytesFlow) {
      this.noteHeld(args);
      this.hold(write);
      Object.defineProperty(res, 'writableNeedDrain', TRUE);
      return false;
    }
    if (this.phase === 'open') {
      // A response without a body is complete with its head: Node ignores what is written to it.
      if (!this.head.announcesBody()) return true;
      this.startStreaming();
    }
    return this.pass(args);
  }

  private end(args: unknown[]): unknown {
    const { res, original } = this;
    // As Node means it: `end(0)` has none.
    const hasChunk = Boolean(args[0]) && typeof args[0] !== 'function';
    if (this.phase === 'discarded') return res;
    if (this.phase === 'passed') return original.end.apply(res, args);
    const isRefused = this.phase === 'open' && !isStatusLine(res.statusCode, res.statusMessage);
    if (isRefused || (hasChunk && !isChunk(args[0]))) return this.letThrow(() => original.end.apply(res, args));
    if (this.phase === 'held' && this.hasHandlerEnded) return this.asFinished(() => ServerResponse.prototype.end.apply(res, args as never));

    this.hasHandlerEnded = true;
    if (hasChunk && this.phase !== 'streaming') this.noteHeld(args);
    if (this.phase === 'held') this.queue.push(() => original.end.apply(res, args));
    else if (this.phase === 'open') this.hold(() => original.end.apply(res, args));
    else {
      // The last chunk may go, unless it completes the response; the end may not.
      if (hasChunk) this.pass(args.filter((argument) => typeof argument !== 'function'));
      this.hold(() =>
        original.end.apply(
          res,
          args.filter((argument) => typeof argument === 'function'),
        ),
      );
    }
    // It stays true: the real end follows, unless the response is discarded. (A getter of its own would slow down all of `res`.)
    Object.defineProperty(res, 'writableEnded', TRUE);
    return res;
  }

  private asFinished(call: () => unknown): unknown {
    this.res.finished = true;
    try {
      return call();
    } finally {
      this.res.finished = false;
    }
  }

  /** For calls that Node refuses: it says so now, and not after COMMIT. */
  private letThrow(call: () => unknown): unknown {
    const { phase } = this;
    this.phase = 'passed';
    try {
      return call();
    } finally {
      this.phase = phase;
    }
  }

  private get letsBytesFlow(): boolean {
    return this.keepers.every((keeper) => keeper.letsBytesFlow);
  }

  private startStreaming(): void {
    this.phase = 'streaming';
    this.head.fix();
    this.remainingLength = this.head.declaredLength;
  }

  /** Sends a chunk, unless it reaches the declared length: the client would have all. */
  private pass(args: unknown[]): unknown {
    const write = (): unknown => this.original.write.apply(this.res, args);
    if (this.remainingLength === undefined) return this.handOn(write);
    this.remainingLength -= Buffer.byteLength(args[0] as string, args[1] as BufferEncoding | undefined);
    if (this.remainingLength > 0) return this.handOn(write);
    // It must not keep the handler from calling `end`, which is what we wait for: not `false`, which makes a pipe wait for
    // `drain`, and its callback at once.
    const callback = args.find((argument) => typeof argument === 'function') as (() => void) | undefined;
    const rest = args.filter((argument) => argument !== callback);
    this.noteHeld(rest);
    this.queue.push(() => this.original.write.apply(this.res, rest));
    if (callback) process.nextTick(callback);
    return true;
  }

  private handOn(call: () => unknown): unknown {
    this.hasHandedOn = true;
    this.sendHead();
    return call();
  }

  /** The work has failed while the handler still runs: the error handlers answer, or, if bytes have left, the connection is cut. */
  refuse(error: unknown, keeper: GateKeeper): void {
    if (!this.settling) this.hold(() => {}, { error, keeper });
  }

  /** From this call on, the response waits until all keepers have settled. @param failure if they can only roll back */
  private hold(call: () => unknown, failure?: Failure): void {
    const { res } = this;
    const hasStreamed = this.hasHandedOn;
    this.phase = 'held';
    this.queue.push(call);
    this.head.hold();
    this.holdFlush();
    const letSocketGo = res.socket ? holdDestroy(res.socket) : () => {};
    let isDestroyRequested = false;
    const destroy = this.overrides.set('destroy', (error?: Error) => {
      if (error || this.phase !== 'held') return destroy.call(res, error);
      isDestroyRequested = true;
      return res;
    });

    const leave = (): void => {
      this.phase = 'passed';
      this.head.letGo();
      delete (res as { writableNeedDrain?: boolean }).writableNeedDrain;
      this.drain.release();
    };
    this.settling = this.settle(!hasStreamed && !this.hasHandlerEnded, failure).then(
      () => {
        // Our methods stay where they are, and stand aside: to take them off costs more.
        leave();
        this.replay();
        if (isDestroyRequested) res.destroy();
        letSocketGo();
      },
      ({ error, keeper }: Failure) => {
        leave();
        this.overrides.remove();
        if (hasStreamed) {
          this.cut(error, keeper);
          letSocketGo();
          return;
        }
        const retry = keeper.retry?.(error);
        if (retry) {
          this.takeBack();
          letSocketGo();
          retry();
          return;
        }
        onClose(this.exchange.req, res, letSocketGo);
        this.discard(error);
      },
    );
  }

  /** Also those that come to the gate meanwhile: `shouldCommit` of one session may use another. */
  private async settle(isBeginning: boolean, failure?: Failure): Promise<void> {
    let first = failure;
    for (const keeper of this.keepers) {
      try {
        await keeper.settle(isBeginning, first);
      } catch (error) {
        if (first && error !== first.error) keeper.report(error);
        first ??= { error, keeper };
      }
    }
    if (first) throw first;
  }

  private replay(): void {
    try {
      this.sendHead();
      let last: unknown;
      for (const call of this.queue) last = call();
      if (!this.hasHandlerEnded && last !== false) this.drain.wake();
    } catch (error) {
      // Node refuses the head only now; what was asked for has been done.
      this.cut(error);
    }
    this.queue = [];
  }

  private sendHead(): void {
    const args = this.head.giveBack();
    if (args) this.original.writeHead.apply(this.res, args);
  }

  /** compression's `flush()` would be lost, and the first server-sent event stay in its buffer. */
  private holdFlush(): void {
    const res = this.res as Response & { flush?: Method };
    if (typeof res.flush !== 'function') return;
    const flush = this.overrides.set('flush', () => {
      if (this.phase === 'held') this.queue.push(() => flush.call(res));
      else flush.call(res);
    });
  }

  /** Nothing has been sent, and another attempt begins with a gate of its own. */
  takeBack(): void {
    if (this.phase === 'discarded') return;
    if (this.phase !== 'passed') {
      this.head.letGo();
      this.overrides.remove();
    }
    this.drop();
    this.res.removeListener('pipe', this.onPipe);
    delete (this.res as { [GATE]?: ResponseGate })[GATE];
  }

  private drop(): void {
    const { res } = this;
    this.phase = 'discarded';
    delete (res as { writableEnded?: boolean }).writableEnded;
    this.queue = [];
    for (const source of this.sources ?? []) source.unpipe(res);
  }

  private discard(error: unknown): void {
    const { res, exchange, hasHandlerEnded } = this;
    this.drop();
    this.savedHead.restore();
    spareConnection(exchange.req, res);
    // A pipe that has been taken off writes no more.
    answerWithError(error, { ...exchange, hasHandlerEnded: hasHandlerEnded || this.sources !== undefined });
  }

  /** The handler has failed. If bytes of its success have left, no error handler must complete them. */
  fail(): void {
    if (this.phase === 'streaming' && this.hasHandedOn) cutConnection(this.res);
  }

  /** Bytes have left: only a broken connection says that they are not the whole truth. */
  private cut(error: unknown, keeper = this.keepers[0]): void {
    keeper?.report(error);
    cutConnection(this.res);
  }
}

const TRUE = { configurable: true, value: true };
const WRAPPED_BY_COMPRESSION = ['on', 'addListener', 'once', 'flush'];

function isChunk(value: unknown): boolean {
  return typeof value === 'string' || value instanceof Uint8Array;
}
